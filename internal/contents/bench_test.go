package contents

import (
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// layerLike makes a tree of 64 MiB: as in images, most files are small, and
// most bytes are in large ones.
func layerLike(b *testing.B) string {
	b.Helper()
	root := b.TempDir()
	defer unix.Sync() // what is dirty cannot be dropped from memory
	random := rand.NewChaCha8([32]byte{1})
	fill := func(dir string, files, size int) {
		dir = filepath.Join(root, dir)
		check(b, os.Mkdir(dir, 0o755))
		for f := range files {
			content := make([]byte, size)
			_, err := random.Read(content)
			check(b, err)
			check(b, os.WriteFile(filepath.Join(dir, strconv.Itoa(f)), content, 0o644))
		}
	}
	fill("small", 2048, 4<<10)
	fill("medium", 128, 128<<10)
	fill("large", 4, 10<<20)
	return root
}

const layerBytes = 2048*4<<10 + 128*128<<10 + 4*10<<20

// bench measures reading: what is in memory, what is on disk, and that past the
// page cache. There is no limit but the disk's.
func bench(b *testing.B, run func(Reading) error) {
	for _, c := range []struct {
		name string
		cold bool
		how  Reading
	}{
		{"warm", false, Reading{}},
		{"cold", true, Reading{}},
		{"direct", true, Reading{Direct: true}},
		{"idle", true, Reading{Direct: true, Idle: true}},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.SetBytes(layerBytes)
			for b.Loop() {
				if c.cold {
					b.StopTimer()
					check(b, os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0))
					b.StartTimer()
				}
				if err := run(c.how); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkWriteContents(b *testing.B) {
	root := layerLike(b)
	path := filepath.Join(b.TempDir(), "contents")
	bench(b, func(how Reading) error {
		_, err := Write(b.Context(), root, path, how)
		return err
	})
}

func BenchmarkVerifyContents(b *testing.B) {
	root := layerLike(b)
	path, digest := contentsOf(b, root)
	bench(b, func(how Reading) error {
		found, err := Verify(b.Context(), root, path, digest, 1, how)
		if len(found) > 0 {
			b.Fatal(found)
		}
		return err
	})
}

// BenchmarkVerifyTar reads the tar too, which is not compressed here.
func BenchmarkVerifyTar(b *testing.B) {
	root := layerLike(b)
	layer := tarOf(b, root)
	bench(b, func(how Reading) error {
		if _, err := layer.Seek(0, io.SeekStart); err != nil {
			return err
		}
		found, err := VerifyTar(b.Context(), root, layer, 1, how)
		if len(found) > 0 {
			b.Fatal(found)
		}
		return err
	})
}
