package state

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
)

// TestPlayer plays a log of a real file system: a file was written and synced,
// and the power goes at every point. Before the sync it may be there or not,
// after it it must be.
func TestPlayer(t *testing.T) {
	for _, fs := range []disk.FS{disk.Ext4, disk.XFS, disk.Btrfs} {
		t.Run(string(fs), func(t *testing.T) {
			d, err := disk.Start(fs.MinSize())
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := d.Close(); err != nil {
					t.Error(err)
				}
			}()
			check := func(err error) {
				t.Helper()
				if err != nil {
					t.Fatal(err)
				}
			}
			check(d.Format(fs))
			base, err := ReadImage(d)
			check(err)
			before := bytes.Clone(d.Image())
			check(d.Reset())

			dir := t.TempDir()
			path := filepath.Join(dir, "file")
			content := bytes.Repeat([]byte("whole "), 10000)
			check(d.Mount(fs, dir))
			check(os.WriteFile(path, content, 0o600))
			check(syncFile(path))
			check(syncFile(dir))
			acked, err := d.Mark("acked")
			check(err)
			check(d.Unmount())
			entries, err := d.Log(0)
			check(err)
			last := bytes.Clone(d.Image())

			l := NewLog(entries)
			plain, err := disk.StartPlain(fs.MinSize())
			check(err)
			defer func() {
				if err := plain.Close(); err != nil {
					t.Error(err)
				}
			}()
			for _, m := range []Medium{d, plain} {
				p, err := NewPlayer(m, base, l)
				check(err)
				for _, point := range []int{len(entries), 0, len(entries)} { // back and forth
					check(p.Set(State{Point: point}))
				}
				if !bytes.Equal(last, m.Image()) {
					t.Fatalf("%T: the last prefix is not the last image", m)
				}
			}
			p, err := NewPlayer(plain, base, l)
			check(err)

			var states, there int
			for _, c := range Enumerate(l, Options{Seed: 1, Want: 60}) {
				check(p.Set(c.State))
				if states%40 == 0 { // a copy of the disk each time
					want := bytes.Clone(before)
					for i := range l.Durable(c.State.Point) {
						entries[i].Apply(want)
					}
					l.Make(c.State, want)
					if !bytes.Equal(want, plain.Image()) {
						t.Fatalf("%s: the image is not that of the log", c.State)
					}
					p.Forget() // to read a hole takes memory, which would be compared from now on
				}
				if err := plain.Mount(fs, dir); err != nil {
					t.Errorf("%s: %v", c.State, err)
					continue
				}
				got, err := os.ReadFile(path)
				states++
				switch {
				case bytes.Equal(got, content):
					there++
				case c.Points[len(c.Points)-1] > acked:
					t.Errorf("%s: synced and lost: %d bytes, %v", c.State, len(got), err)
				case err != nil && !errors.Is(err, os.ErrNotExist):
					t.Errorf("%s: %v", c.State, err)
				}
				check(plain.Unmount())
			}
			if there == 0 || there == states {
				t.Errorf("the file is there in %d of %d states: the states do not differ", there, states)
			}
		})
	}
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
