package commit

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestKillHealing visits the points of healing: the daemon dies of SIGKILL while
// it extracts a damaged layer again, and the next one runs in the same boot, where
// what the journal records as whole is not verified.
func TestKillHealing(t *testing.T) {
	s := newScene(t)
	s.heals = true
	start(t, s.next(t, ""))
	s.connected(t)
	l := s.lease(t)
	check(t, unavailable(t, nil, func() error { return s.pull(l.ctx, "durable", s.image) }))
	check(t, s.Daemon.Stop())
	names := s.recorded(t)
	for _, damage := range []struct{ what, gone string }{{"tree removed", "fs"}, {"layer removed", "."}} {
		placed := false
		for _, point := range killPoints(t, "Healing") {
			placed = placed || point == "heal.exchanged"
			t.Run(damage.what+" "+point, func(t *testing.T) {
				name := names[s.image.ChainIDs[1].String()]
				row, ok := kittest.Inspect(t, s.Daemon).Find(name)
				if !ok {
					t.Fatalf("no row of %q", name)
				}
				tree := s.Daemon.LayerDir(row.ID)
				check(t, os.RemoveAll(filepath.Join(filepath.Dir(tree), damage.gone)))
				// It heals as soon as it starts: there is no time to call it.
				s.dies(t, point, func(d *kit.Daemon) { check(t, d.Launch()) })
				if _, err := os.Lstat(tree); (err == nil) != placed {
					t.Fatalf("the tree is in its place: %t (%v), want %t", err == nil, err, placed)
				}
				s.healed(t, names)
			})
		}
	}
	check(t, l.release())
}

// healed starts the next daemon and verifies what it makes of that.
func (s *scene) healed(t *testing.T, names map[string]string) {
	t.Helper()
	sn := start(t, s.next(t, ""))
	s.connected(t)
	s.whole(t, s.image, names)
	if left := list(t, s.Daemon.Root, "healing"); len(left) > 0 {
		t.Errorf("left in healing/: %v", left)
	}
	// By containerd and with a lease, or its collection takes it away.
	l, containerd := s.lease(t), s.client.SnapshotService("durable")
	m, err := containerd.Prepare(l.ctx, "container", s.image.Top())
	if err != nil {
		t.Fatalf("prepare a container: %v", err)
	}
	check(t, writeLayer(upper(t, m), 1))
	must[mounts](t)(containerd.Mounts(l.ctx, "container"))
	check(t, containerd.Remove(l.ctx, "container"))
	check(t, l.release())
	cleanUp(t, sn)
	// containerd may collect garbage at the same time.
	waitFor(t, 20*time.Second, func() error { return orphans(t, s.Daemon) })
	check(t, s.Daemon.Stop())
}
