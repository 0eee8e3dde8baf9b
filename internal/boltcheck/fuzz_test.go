package boltcheck

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// FuzzCheck changes bytes of a healthy file: five bytes of input are a change, four of them
// where and one to what. What Check accepts, bbolt reads without a panic.
func FuzzCheck(f *testing.F) {
	path := filepath.Join(f.TempDir(), fileName)
	fill(f, path, 40) // a tree of two levels
	healthy, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte{0, 0, 0, 0, 0})
	f.Add([]byte("01\x00 \x00")) // a bucket of the file is a value
	for page := range byte(len(healthy) / pageSize) {
		for _, at := range []byte{8, 10, 12, pageHeader, pageHeader + 4, pageHeader + 8} {
			f.Add([]byte{0, 0, page << 4, at, 1, 0, 0, page << 4, at + 1, 0xff})
		}
	}
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { file.Close() })
	f.Fuzz(func(t *testing.T, changes []byte) {
		if _, err := file.WriteAt(healthy, 0); err != nil {
			t.Fatal(err)
		}
		for c := changes; len(c) >= 5; c = c[5:] {
			at := int64(c[0])<<24 | int64(c[1])<<16 | int64(c[2])<<8 | int64(c[3])
			if _, err := file.WriteAt(c[4:5], at%int64(len(healthy))); err != nil {
				t.Fatal(err)
			}
		}
		switch err := Check(file, errDamaged); {
		case err != nil && !errors.Is(err, errDamaged):
			t.Errorf("error %v", err)
		case err == nil:
			if err := readWithBbolt(path); err != nil {
				t.Errorf("is accepted, and bbolt: %v", err)
			}
		}
	})
}
