package contents

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/finding"
)

// pieces makes a file of a size with content at some offsets, and holes.
func pieces(t testing.TB, path string, size int64, at ...int64) {
	t.Helper()
	f, err := os.Create(path)
	check(t, err)
	defer f.Close()
	check(t, f.Truncate(size))
	for _, off := range at {
		_, err := f.WriteAt(bytes.Repeat([]byte("data"), 5000), off)
		check(t, err)
	}
	check(t, f.Sync())
	var st unix.Stat_t
	check(t, unix.Fstat(int(f.Fd()), &st))
	if st.Blocks*512 > size/2 {
		t.Skip("this file system has no holes")
	}
}

// TestHuge: holes take neither time nor any of the allowed rate, and what is in
// between is compared.
func TestHuge(t *testing.T) {
	const size = 8 << 40
	root := formatted(t, "xfs", 512<<20) + "/fs"
	check(t, os.Mkdir(root, 0o755))
	pieces(t, root+"/lastlog", size, 0, 1<<40+512, size-20_000)
	how := Reading{Rate: 32 << 20}
	began := time.Now()
	var sum int64
	counted := how
	counted.Progress = func(n int64) { sum += n }
	path := filepath.Join(t.TempDir(), "contents")
	digest, err := Write(t.Context(), root, path, counted)
	check(t, err)
	if sum != size {
		t.Errorf("%d bytes were dealt with, not %d", sum, int64(size))
	}
	if !strings.Contains(text(t, path), "./lastlog type=file size=8796093022208 tags=sparse-sha256:") {
		t.Errorf("the list is %q", text(t, path))
	}
	for _, direct := range []bool{false, true} {
		how.Direct = direct
		if found, err := Verify(t.Context(), root, path, digest, 5, how); err != nil || len(found) > 0 {
			t.Errorf("found %v, error %v", found, err)
		}
	}
	for name, change := range map[string]func(f *os.File) error{
		"data in a hole": func(f *os.File) error { _, err := f.WriteAt([]byte{1}, 3<<40); return err },
		"punched":        func(f *os.File) error { return unix.Fallocate(int(f.Fd()), 3, 1<<40, 64<<10) },
		"last block":     func(f *os.File) error { _, err := f.WriteAt([]byte{1}, size-1); return err },
	} {
		pieces(t, root+"/lastlog", size, 0, 1<<40+512, size-20_000)
		f, err := os.OpenFile(root+"/lastlog", os.O_RDWR, 0)
		check(t, err)
		check(t, errors.Join(change(f), f.Close()))
		found, err := Verify(t.Context(), root, path, digest, 5, how)
		if err != nil || len(found) != 1 || found[0].What != "sparse-sha256" {
			t.Errorf("%s: found %v, error %v", name, found, err)
		}
	}
	if took := time.Since(began); took > 2*time.Minute {
		t.Errorf("took %v", took)
	}
}

// TestHolesAreZeros: whether zeros are written or a hole is no difference, by
// either digest.
func TestHolesAreZeros(t *testing.T) {
	for name, size := range map[string]int64{"small": 300_001, "large": 5<<20 + 77} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			pieces(t, root+"/file", size, 8192+512, size-20_000)
			path, digest := contentsOf(t, root)
			if large := strings.Contains(text(t, path), "sparse-sha256"); large != (name == "large") {
				t.Errorf("the list is %q", text(t, path))
			}
			layer := tarOf(t, root)
			content, err := os.ReadFile(root + "/file")
			check(t, err)
			if name == "small" && !strings.Contains(text(t, path), fmt.Sprintf("%x", sha256.Sum256(content))) {
				t.Errorf("not the digest of the content: %q", text(t, path))
			}
			verify := func(what, want string) {
				t.Helper()
				for _, how := range readings {
					found, err := Verify(t.Context(), root, path, digest, 5, how)
					if err != nil || !strings.HasPrefix(join(found), want) || want == "" && len(found) > 0 {
						t.Errorf("%s: found %v, error %v", what, found, err)
					}
					_, err = layer.Seek(0, io.SeekStart)
					check(t, err)
					found, err = VerifyTar(t.Context(), root, layer, 5, how)
					if err != nil || len(found) > 0 != (want != "") {
						t.Errorf("%s, tar: found %v, error %v", what, found, err)
					}
				}
			}
			verify("as it was", "")
			check(t, os.WriteFile(root+"/file", content, 0o644))
			verify("holes filled", "")
			run(t, "fallocate", "-d", root+"/file")
			verify("holes dug", "")
			f, err := os.OpenFile(root+"/file", os.O_RDWR, 0)
			check(t, err)
			check(t, errors.Join(unix.Fallocate(int(f.Fd()), 3, size/4096*4096-8192, 4096), f.Close())) // FALLOC_FL_PUNCH_HOLE|FALLOC_FL_KEEP_SIZE
			verify("data punched", "file: "+map[string]string{"small": "sha256digest", "large": "sparse-sha256"}[name])
			check(t, os.WriteFile(root+"/file", content, 0o644))
			run(t, "fallocate", "-d", root+"/file")
			check(t, flipIn(root+"/file", 100_000))
			verify("data in a hole", "file: "+map[string]string{"small": "sha256digest", "large": "sparse-sha256"}[name])
		})
	}
}

// TestSparseTar: the holes of a file are not read to compare it with a tar, and
// differences in content above the size at which its digest is another one are
// found.
func TestSparseTar(t *testing.T) {
	const size = 1<<30 + 12345
	root := t.TempDir()
	pieces(t, root+"/file", size, 0, 700<<20, size-20_000)
	layer := filepath.Join(t.TempDir(), "layer.tar")
	run(t, "tar", "--sparse", "-C", root, "-cf", layer, "file")
	f, err := os.Open(layer)
	check(t, err)
	defer f.Close()
	verify := func(how Reading) []finding.Finding {
		t.Helper()
		_, err := f.Seek(0, io.SeekStart)
		check(t, err)
		found, err := VerifyTar(t.Context(), root, f, 5, how)
		check(t, err)
		return found
	}
	began := time.Now()
	if found := verify(Reading{Rate: 1 << 20}); len(found) > 0 { // 17 minutes, if all of it counted
		t.Errorf("found %v", found)
	}
	if took := time.Since(began); took > 2*time.Minute {
		t.Errorf("took %v", took)
	}
	check(t, flipIn(root+"/file", 500<<20))
	if found := verify(Reading{}); len(found) != 1 || found[0].What != "sparse-sha256" {
		t.Errorf("found %v", found)
	}
}

// TestLongNameInTar: a name that cannot be unpacked costs no memory.
func TestLongNameInTar(t *testing.T) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	check(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: strings.Repeat("a/", 200_000) + "b", Linkname: "x", Format: tar.FormatPAX}))
	check(t, w.Close())
	if found, err := VerifyTar(t.Context(), t.TempDir(), &b, 5, Reading{}); err == nil || !strings.Contains(err.Error(), "400001 bytes") {
		t.Errorf("found %v, error %v", found, err)
	}
}

// TestContentHash: the digest depends on neither the pieces it gets nor on which
// zeros are in holes.
func TestContentHash(t *testing.T) {
	content := make([]byte, 5*sparseBlock+100)
	copy(content[sparseBlock+10:], "data")
	copy(content[5*sparseBlock:], "end")
	for _, sparse := range []bool{false, true} {
		sums := map[string]bool{}
		for _, piece := range []int{1, 7, 100, sparseBlock, sparseBlock + 1, len(content)} {
			for _, holes := range []bool{false, true} {
				h := newContentHash(sparse)
				for rest := content; len(rest) > 0; {
					n := min(piece, len(rest))
					if holes && isZero(rest[:n]) {
						check(t, h.zeros(t.Context(), int64(n)))
					} else {
						h.write(rest[:n])
					}
					rest = rest[n:]
				}
				sums[h.hex()] = true
			}
		}
		if len(sums) != 1 || !sparse && !sums[fmt.Sprintf("%x", sha256.Sum256(content))] {
			t.Errorf("sparse %v: digests %v", sparse, sums)
		}
		for _, other := range [][]byte{content[:len(content)-1], append(bytes.Clone(content), 0), flip(content, 3*sparseBlock), content[sparseBlock:]} {
			h := newContentHash(sparse)
			h.write(other)
			if sums[h.hex()] {
				t.Error("the same digest of other content")
			}
		}
	}
}
