package contents

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/finding"
)

// ways are the three functions that read content, of a tree that is healthy.
func ways(t *testing.T, root string) map[string]func(Reading) error {
	t.Helper()
	path, digest := contentsOf(t, root)
	healthy := func(found []finding.Finding, err error) error {
		if err == nil && len(found) > 0 {
			err = fmt.Errorf("found %v", found)
		}
		return err
	}
	return map[string]func(Reading) error{
		"Write": func(how Reading) error {
			again, err := Write(t.Context(), root, path+".again", how)
			if err == nil && again != digest {
				err = fmt.Errorf("digest %s, was %s", again, digest)
			}
			return err
		},
		"Verify": func(how Reading) error {
			return healthy(Verify(t.Context(), root, path, digest, 10, how))
		},
		"VerifyTar": func(how Reading) error {
			return healthy(VerifyTar(t.Context(), root, tarOf(t, root), 10, how))
		},
	}
}

// bytesOf are the sizes of the regular files below a root, those with several
// names once.
func bytesOf(t *testing.T, root string) int64 {
	t.Helper()
	_, s := sealOf(t, root)
	return s.Bytes
}

func TestProgress(t *testing.T) {
	root := withContent(t)
	for name, run := range ways(t, root) {
		for how, reading := range readings {
			var sum int64
			reading.Progress = func(n int64) { sum += n }
			check(t, run(reading))
			if want := bytesOf(t, root); sum != want {
				t.Errorf("%s, %s: %d bytes, not %d", name, how, sum, want)
			}
		}
	}
}

// TestIdle: all content is read by a thread that has idle priority.
func TestIdle(t *testing.T) {
	root := withContent(t)
	for name, run := range ways(t, root) {
		t.Run(name, func(t *testing.T) {
			var tid int
			var first, last int64
			check(t, run(Reading{Idle: true, Progress: func(int64) {
				const classIdle = 3 << 13
				if p, _, errno := unix.RawSyscall(unix.SYS_IOPRIO_GET, 1, 0, 0); errno != 0 || p != classIdle {
					t.Errorf("priority %#x, %v", p, errno)
				}
				b, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/io", unix.Gettid()))
				check(t, err)
				_, err = fmt.Fscanf(bytes.NewReader(b), "rchar: %d", &last)
				check(t, err)
				if tid == 0 {
					tid, first = unix.Gettid(), last
				}
				if tid != unix.Gettid() {
					t.Errorf("thread %d, and then %d", tid, unix.Gettid())
				}
			}}))
			// What is read after the last report is not seen.
			if least := bytesOf(t, root) - 2*chunk; last-first < least {
				t.Errorf("the thread has read %d bytes, not %d", last-first, least)
			}
		})
	}
}

func TestRate(t *testing.T) {
	root := withContent(t)
	for name, run := range ways(t, root) {
		rate := bytesOf(t, root) * 5
		began := time.Now()
		check(t, run(Reading{Rate: rate}))
		// The last chunk does not wait for its own time.
		least := time.Duration(float64(rate/5-chunk) / float64(rate) * float64(time.Second))
		if took := time.Since(began); took < least {
			t.Errorf("%s took %v, at least %v is what the rate allows", name, took, least)
		}
	}
}

// TestReadOnly: reading changes nothing, not even the times of access.
func TestReadOnly(t *testing.T) {
	root := withContent(t)
	for name, run := range ways(t, root) {
		var before, after unix.Stat_t
		// Older than the last change, so that relatime would move it.
		times := []unix.Timespec{{Sec: 1}, {Sec: 2}}
		check(t, unix.UtimesNanoAt(unix.AT_FDCWD, root+"/dir/big", times, 0))
		check(t, unix.Stat(root+"/dir/big", &before))
		if name != "VerifyTar" { // tar itself reads
			check(t, run(Reading{}))
		} else {
			layer := tarOf(t, root, "--atime-preserve=system")
			_, err := VerifyTar(t.Context(), root, layer, 1, Reading{})
			check(t, err)
		}
		check(t, unix.Stat(root+"/dir/big", &after))
		if before.Atim != after.Atim || before.Ctim != after.Ctim {
			t.Errorf("%s: times were %v %v, are %v %v", name, before.Atim, before.Ctim, after.Atim, after.Ctim)
		}
	}
}

// cached is how many pages of a file are in memory (cachestat(2), Linux 6.5).
func cached(t *testing.T, path string) uint64 {
	t.Helper()
	f, err := os.Open(path)
	check(t, err)
	defer f.Close()
	const sysCachestat = 451
	all := struct{ off, len uint64 }{}
	var stat struct{ cache, dirty, writeback, evicted, recentlyEvicted uint64 }
	_, _, errno := unix.Syscall6(sysCachestat, f.Fd(), uintptr(unsafe.Pointer(&all)), uintptr(unsafe.Pointer(&stat)), 0, 0, 0)
	if errno == unix.ENOSYS {
		t.Skip("cachestat needs Linux 6.5")
	}
	if errno != 0 {
		t.Fatal("cachestat: ", errno)
	}
	return stat.cache
}

// TestDirect: the page cache is neither used nor filled.
func TestDirect(t *testing.T) {
	root := withContent(t)
	big := root + "/dir/big"
	path, digest := contentsOf(t, root)
	forget := func() {
		f, err := os.Open(big)
		check(t, err)
		defer f.Close()
		check(t, f.Sync())
		check(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
		if n := cached(t, big); n != 0 {
			t.Fatalf("%d pages stay in memory", n)
		}
	}
	for direct, want := range map[bool]bool{false: true, true: false} {
		forget()
		found, err := Verify(t.Context(), root, path, digest, 1, Reading{Direct: direct})
		if err != nil || len(found) > 0 {
			t.Fatal(found, err)
		}
		if n := cached(t, big); n > 0 != want {
			t.Errorf("direct %v: %d pages in memory", direct, n)
		}
	}
}

// TestBadDisk reads files whose blocks the disk has changed, from btrfs, which
// keeps checksums and answers with an I/O error.
func TestBadDisk(t *testing.T) {
	if _, err := exec.LookPath("mkfs.btrfs"); err != nil || os.Geteuid() != 0 {
		t.Skip("needs root, and mkfs.btrfs: apt-get install btrfs-progs")
	}
	dir := t.TempDir()
	image, mnt := dir+"/disk", dir+"/mnt"
	must := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s %v: %v: %s", name, args, err, out)
		}
	}
	check(t, os.WriteFile(image, nil, 0o600))
	check(t, os.Truncate(image, 256<<20))
	check(t, os.Mkdir(mnt, 0o755))
	must("mkfs.btrfs", "-q", image)
	must("mount", "-o", "loop", image, mnt)
	t.Cleanup(func() { must("umount", mnt) })

	root := mnt + "/fs"
	check(t, os.Mkdir(root, 0o755))
	content := make([]byte, 2*chunk)
	_, err := rand.Read(content)
	check(t, err)
	for _, name := range []string{"bad", "good"} {
		content[0] ^= 1
		check(t, os.WriteFile(root+"/"+name, content, 0o644))
	}
	path, digest := contentsOf(t, root)
	layer := tarOf(t, root)
	unix.Sync()

	// Behind the back of the file system, the second half of "bad".
	disk, err := os.ReadFile(image)
	check(t, err)
	mark := content[chunk : chunk+4096]
	at := bytes.Index(disk, mark)
	if at < 0 || bytes.Count(disk, mark) != 2 {
		t.Fatalf("the content is %d times on the disk", bytes.Count(disk, mark))
	}
	first := bytes.Index(disk, flip(content[:4096], 0))
	if first < 0 {
		t.Fatal("no beginning of the first file on the disk")
	}
	check(t, flipIn(image, int64(first+chunk)))

	verify := func(how Reading) (found [2]string) {
		t.Helper()
		contents, err := Verify(t.Context(), root, path, digest, 10, how)
		check(t, err)
		_, err = layer.Seek(0, 0)
		check(t, err)
		tar, err := VerifyTar(t.Context(), root, layer, 10, how)
		check(t, err)
		return [2]string{join(contents), join(tar)}
	}
	// What is in use is still in memory and as it was.
	if found := verify(Reading{}); found != [2]string{} {
		t.Errorf("found %q in memory", found)
	}
	for _, how := range []Reading{{Direct: true}, {}} {
		for _, f := range verify(how) {
			if f != "bad: unreadable: input/output error" {
				t.Errorf("direct %v: found %q", how.Direct, f)
			}
		}
		check(t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0))
	}
	if _, err := Write(context.Background(), root, path+".again", Reading{}); !strings.Contains(fmt.Sprint(err), "bad: input/output error") {
		t.Errorf("the digest of what cannot be read: %v", err)
	}
}
