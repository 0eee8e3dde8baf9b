package seal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
)

// TestTooLarge: an entry that is sealed can be verified, and one that has more
// attributes than MaxEntry is refused, with its name.
func TestTooLarge(t *testing.T) {
	root := formatted(t, "xfs", 1<<30) + "/fs"
	check(t, os.Mkdir(root, 0o755))
	file := root + "/some file"
	check(t, os.WriteFile(file, nil, 0o644))
	value := bytes.Repeat([]byte("x"), 64000)
	fill := func(n int) {
		for i := range n {
			check(t, unix.Setxattr(file, fmt.Sprintf("user.a%d", i), value, 0))
		}
	}
	fill(MaxEntry/64010 - 1)
	path, s := sealOf(t, root)
	if found, err := Verify(t.Context(), root, path, s.Digest, 5); err != nil || len(found) > 0 {
		t.Errorf("found %v, error %v", found, err)
	}
	for _, n := range []int{MaxEntry/64000 + 1, 220} {
		fill(n)
		_, err := Write(t.Context(), root, path+".again")
		if !errors.Is(err, mtree.ErrTooLarge) || !strings.Contains(err.Error(), "some file") || !strings.Contains(err.Error(), fmt.Sprint(MaxEntry)) {
			t.Errorf("%d attributes: %v", n, err)
		}
	}
	// In the seal of an earlier version they may be.
	fill(150)
	for i := 150; i < 220; i++ {
		_ = unix.Removexattr(file, fmt.Sprintf("user.a%d", i))
	}
	before, digest := sealBefore(t, root)
	if found, err := Verify(t.Context(), root, before, digest, 5); err != nil || len(found) > 0 {
		t.Errorf("found %v, error %v", found, err)
	}
	check(t, unix.Setxattr(file, "user.a7", value[:10], 0))
	if found, err := Verify(t.Context(), root, before, digest, 5); err != nil || len(found) != 1 {
		t.Errorf("found %v, error %v", found, err)
	}
	// Or have more than can be read: then it cannot be compared, but is the seal.
	fill(220)
	before, digest = sealBefore(t, root)
	if found, err := Verify(t.Context(), root, before, digest, 5); !errors.Is(err, mtree.ErrTooLarge) || errors.Is(err, mtree.ErrUnsealed) {
		t.Errorf("found %v, error %v", found, err)
	}
	if found, err := Verify(t.Context(), root, before, s.Digest, 5); !errors.Is(err, mtree.ErrUnsealed) && !errors.Is(err, mtree.ErrTooLarge) {
		t.Errorf("found %v, error %v", found, err)
	}
	// More names than the kernel lists.
	for i := range 3000 {
		check(t, unix.Setxattr(root, fmt.Sprintf("user.%s%d", strings.Repeat("n", 40), i), nil, 0))
	}
	if _, err := Write(t.Context(), root, path+".again"); !errors.Is(err, mtree.ErrTooLarge) {
		t.Errorf("a long list of names: %v", err)
	}
}

// child runs a function of this file in a process of its own and returns the
// peak of its memory in MiB and the time it took.
func child(t *testing.T, do, root string) (mib float64, took time.Duration) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestChild$", "-test.v")
	cmd.Env = append(os.Environ(), "SEAL_CHILD="+do, "SEAL_ROOT="+root, "SEAL_FILE="+filepath.Join(t.TempDir(), "seal"))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", do, err, out)
	}
	_, result, _ := strings.Cut(string(out), "peak ")
	var seconds float64
	if _, err := fmt.Sscanf(result, "%f MiB, %f s", &mib, &seconds); err != nil {
		t.Fatalf("%s: %v: %s", do, err, out)
	}
	return mib, time.Duration(seconds * float64(time.Second))
}

// TestChild is what child runs.
func TestChild(t *testing.T) {
	root, file := os.Getenv("SEAL_ROOT"), os.Getenv("SEAL_FILE")
	began := time.Now()
	switch os.Getenv("SEAL_CHILD") {
	case "":
		t.Skip("is run by other tests")
	case "seal":
		s, err := ChangeAndWrite(t.Context(), root, file, nothing(t), nil, nil)
		check(t, err)
		took := time.Since(began)
		defer func() { fmt.Printf("peak %f MiB, %f s\n", peak(t), took.Seconds()) }()
		found, err := Verify(t.Context(), root, file, s.Digest, 5)
		if err != nil || len(found) > 0 {
			t.Fatal(found, err)
		}
	}
}

// nothing changes nothing. With it all attributes are read, as in a Commit.
func nothing(t testing.TB) Change {
	return func(_ context.Context, path string, e *Entry) (bool, error) {
		if e.Path != "." && len(path) <= len(e.Path) {
			t.Errorf("path %s of %s", path, e.Path)
		}
		return false, nil
	}
}

// peak is the most memory that the process had, in MiB (VmHWM of proc_pid_status(5)).
func peak(t testing.TB) float64 {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	check(t, err)
	for line := range strings.Lines(string(status)) {
		var kib float64
		if n, _ := fmt.Sscanf(line, "VmHWM: %f", &kib); n == 1 {
			return kib / 1024
		}
	}
	t.Fatal("no VmHWM")
	return 0
}

// TestMemory: no tree takes more than 150 MiB to seal and to verify.
func TestMemory(t *testing.T) {
	const most = 150
	for name, make := range map[string]func(root string){
		// 15 attributes of 64 KiB come out of one PAX header of 1 MiB.
		"large attributes": func(root string) {
			value := bytes.Repeat([]byte("A"), 1<<16)
			for i := range 256 {
				file := fmt.Sprintf("%s/%d", root, i)
				check(t, os.WriteFile(file, nil, 0o644))
				for j := range 15 {
					check(t, unix.Setxattr(file, fmt.Sprintf("user.a%d", j), value, 0))
				}
			}
		},
		"small attributes": func(root string) {
			value := bytes.Repeat([]byte("A"), longValue)
			for i := range 100 {
				dir := fmt.Sprintf("%s/%d", root, i)
				check(t, os.Mkdir(dir, 0o755))
				for j := range 900 {
					check(t, unix.Setxattr(dir, fmt.Sprintf("user.a%d", j), value, 0))
				}
			}
		},
		"many names": func(root string) {
			for i := range 500_000 {
				check(t, unix.Mknod(fmt.Sprintf("%s/name-%d", root, i), unix.S_IFREG|0o644, 0))
			}
		},
		"long names": func(root string) {
			for i := range 100_000 {
				check(t, unix.Mknod(fmt.Sprintf("%s/%0255d", root, i), unix.S_IFREG|0o644, 0))
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			root := formatted(t, "xfs", 4<<30) + "/fs"
			check(t, os.Mkdir(root, 0o755))
			make(root)
			mib, took := child(t, "seal", root)
			t.Logf("%.0f MiB, sealed in %v", mib, took)
			if mib > most {
				t.Errorf("%.0f MiB, at most %d are wanted", mib, most)
			}
			if took > time.Minute {
				t.Errorf("sealing took %v", took)
			}
		})
	}
}
