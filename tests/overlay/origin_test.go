package overlay

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestEntriesAreKnown: whether a directory has an entry in its tar decides what
// it inherits, and is known on every kind of clock that inodes have, while
// something reads all directories all the time: an antivirus, updatedb, the CRI
// plugin that calls Usage.
func TestEntriesAreKnown(t *testing.T) {
	for name, opts := range map[string]kit.DiskOptions{
		"ext4, whole seconds": {FS: "ext4", Mkfs: []string{"-I", "128"}},
		"ext4":                {FS: "ext4", Mkfs: []string{"-I", "256"}},
		"ext4, strictatime":   {FS: "ext4", Mkfs: []string{"-I", "256"}, Mount: "strictatime"},
		"xfs":                 {FS: "xfs"},
		"btrfs":               {FS: "btrfs"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNodeIn(t, kittest.NewDisk(t, opts).Path(), "", "")
			n.pause = 1200 * time.Millisecond // into another second
			stop := n.readAllTheTime(t)
			defer stop()
			for _, w := range ways[:2] {
				if err := n.compare(t.Context(), timely(), w); err != nil {
					t.Error(err)
				}
			}
			stop()
		})
	}
}

// timely is an image whose directories have times of the seconds around now,
// when it is unpacked. In the middle of the upper layer is a file that makes the
// applier read the rest of the tar later.
func timely() image {
	odd := func(name string) entry { return mkdir(name).withMode(0o700).withOwner(11, 12) }
	lower, upper := layer{odd("app"), mkfile("app/old"), odd("late"), mkfile("late/old")}, layer{mkfile("app/new"), mkfile("late/new")}
	now := time.Now().Truncate(time.Second)
	for i := range 15 {
		name := fmt.Sprintf("second%02d", i)
		lower = append(lower, odd(name))
		upper = append(upper, mkdir(name).withTime(now.Add(time.Duration(i-2)*time.Second)))
	}
	big := mkfile("big")
	big.body = string(make([]byte, 8<<20))
	img := image{lower, append(upper, big, empty("app"), mkfile("late/newer"))}
	for _, l := range img {
		for i, e := range l {
			l[i] = e.withTime(e.mtime.Truncate(time.Second)) // what every file system can keep
		}
	}
	return img
}

// readAllTheTime reads all directories of the daemon's snapshots, and queries
// the usage of all that are active, until stop is called.
func (n *node) readAllTheTime(t *testing.T) (stop func()) {
	sn := must[snapshots.Snapshotter](t)(n.daemon.Snapshotter())
	done, ended := make(chan struct{}), make(chan struct{})
	rounds := 0
	go func() {
		defer close(ended)
		for ; ; rounds++ {
			_ = filepath.WalkDir(filepath.Join(n.daemon.Root, "snapshots"), func(string, os.DirEntry, error) error { return nil })
			_ = sn.Walk(t.Context(), func(ctx context.Context, info snapshots.Info) error {
				_, _ = sn.Usage(ctx, info.Name)
				return nil
			})
			select {
			case <-done:
				return
			case <-time.After(2 * time.Millisecond):
			}
		}
	}()
	return sync.OnceFunc(func() {
		close(done)
		<-ended
		if err := sn.Close(); err != nil {
			t.Error(err)
		}
		if rounds < 20 {
			t.Errorf("everything was read %d times only", rounds)
		}
	})
}
