package full

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
)

// TestSpoiled does damage to a disk that is well, and expects each examination to find
// it and to blame what it may.
func TestSpoiled(t *testing.T) {
	r := record(t, Setup{FS: disk.Ext4, Daemon: ours("record"), Name: "spoiled", Rounds: 1})
	end := len(r.Log.Entries)
	last := []state.Case{{State: state.State{Point: end, Class: state.Prefix}, Points: []int{end}}}
	first := bench.images[0]
	for _, c := range []struct {
		name  string
		spoil func(mountpoint string) error
		find  []string // parts of findings, in the form of oracle.Finding
		well  bool     // the snapshotter is not to be blamed
		count func(Counts) int
	}{
		{
			name:  "nothing",
			spoil: func(string) error { return nil },
			well:  true,
			count: func(c Counts) int { return c.Swept },
		},
		{
			name:  "a file of a layer is empty",
			spoil: func(dir string) error { return os.Truncate(oneFile(t, dir), 0) },
			// The daemon verifies and reports it: there is no lie.
			find: []string{"lost: " + namespace + "/", "lost: " + host, "is damaged"},
		},
		{
			name:  "the layers are gone, and the daemon begins anew",
			spoil: func(dir string) error { return os.RemoveAll(filepath.Join(dir, snapshotterDir)) },
			find:  []string{"and it is not there", "committed in containerd's database, and the daemon does not have it", "and it is not unpacked"},
		},
		{
			name: "a layer cannot be deleted",
			spoil: func(dir string) error {
				out, err := exec.Command("chattr", "+i", oneFile(t, dir)).CombinedOutput()
				if err != nil {
					err = fmt.Errorf("chattr: %w: %s", err, out)
				}
				return err
			},
			find: []string{"everything was removed, and there are left"},
		},
		{
			name:  "a manifest in the content store is empty",
			spoil: func(dir string) error { return os.Truncate(blobFile(dir, first.Manifest.Encoded()), 0) },
			well:  true,
			count: func(c Counts) int { return c.Unread * c.Damaged },
		},
		{
			name: "containerd's database is no database",
			spoil: func(dir string) error {
				return os.WriteFile(filepath.Join(dir, containerdDir, metaDB), make([]byte, 1<<16), 0o600)
			},
			well:  true,
			count: func(c Counts) int { return c.NotBooted },
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			tally := run(t, &Check{Recording: r, Cases: last, spoil: c.spoil, patience: time.Second})
			var found strings.Builder
			for _, b := range tally.Bad {
				for _, f := range b.Findings {
					fmt.Fprintln(&found, f)
				}
			}
			if tally.Clean() != c.well {
				t.Errorf("the snapshotter is well: %t, want %t: %s", tally.Clean(), c.well, found.String())
			}
			for _, want := range c.find {
				if !strings.Contains(found.String(), want) {
					t.Errorf("not found: %q; found:\n%s", want, found.String())
				}
			}
			if c.count != nil && c.count(tally.Counts) == 0 {
				t.Errorf("not counted: %v %v", tally.Counts, tally.Notes)
			}
		})
	}
}

// oneFile is a file in a layer of the daemon that has content.
func oneFile(t *testing.T, mountpoint string) string {
	t.Helper()
	found := ""
	done := errors.New("found")
	err := filepath.WalkDir(filepath.Join(mountpoint, snapshotterDir, "snapshots"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || !strings.Contains(path, "/fs/usr/lib/") {
			return err
		}
		if info, err := d.Info(); err != nil || info.Size() == 0 {
			return err
		}
		found = path
		return done
	})
	if !errors.Is(err, done) {
		t.Fatalf("no file with content below %s: %v", mountpoint, err)
	}
	return found
}

func blobFile(mountpoint, hex string) string {
	return filepath.Join(mountpoint, containerdDir, "root/io.containerd.content.v1.content/blobs/sha256", hex)
}
