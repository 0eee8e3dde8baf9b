package commit

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// scene is a node whose daemons die at named points, on a disk that can fail.
type scene struct {
	*node
	disk  *disk.Disk
	mount string
	power bool // the machine goes down with the daemon

	image kit.Pushed   // three layers, pulled while the daemon dies
	base  []kit.Pushed // pulled long before
}

// TestKill visits every named point: the daemon dies there of SIGKILL, alone or
// with the power of the machine, while a real containerd pulls, labels or removes
// an image of three layers, or while it starts.
func TestKill(t *testing.T) {
	s := newScene(t)
	s.visitAll(t, killPoints(t, "All"))
}

// visitAll visits each point without the power and with it, or in make test one of the
// two, in turn.
func (s *scene) visitAll(t *testing.T, points []string) {
	t.Helper()
	for lost, power := range []bool{false, true} {
		s.power = power
		for i, point := range points {
			if kittest.Turn(i+lost, 2) {
				t.Run(fmt.Sprintf("%s power=%t", point, power), func(t *testing.T) { s.visit(t, point) })
			}
		}
	}
}

// TestKillApply is TestKill for what our differ extracts, with the blobs at hand: no layer may
// need them, though.
func TestKillApply(t *testing.T) {
	s := newScene(t, "durable")
	s.visitAll(t, append(killPoints(t, "Applying"), "commit.synced", "commit.in-tx", "commit.done"))
}

// newScene makes a scene. Our differ extracts the layers of the snapshotters that differ
// names.
func newScene(t *testing.T, differ ...string) *scene {
	t.Helper()
	s := &scene{disk: must[*disk.Disk](t)(disk.Start(256 << 20)), mount: t.TempDir()}
	t.Cleanup(func() {
		if err := s.disk.Close(); err != nil {
			t.Error(err)
		}
	})
	check(t, s.disk.Format(disk.Ext4))
	check(t, s.disk.Mount(disk.Ext4, s.mount))
	check(t, s.disk.Watch()) // it is not to keep a log
	s.node = newNode(t, filepath.Join(s.mount, "durable"), differ...)
	s.heals = len(differ) > 0
	s.image = s.push(t, "three-layers", must[kit.Image](t)(kit.Runnable(t.Context())))
	base := s.push(t, "base", kit.Image{Layers: []kit.Layer{
		kit.NewLayer(kit.Gzip, kit.Dir("base", 0o755), kit.File("base/file", 0o644, "a layer of long ago\n")),
	}})
	start(t, s.next(t, ""))
	check(t, unavailable(t, nil, func() error { return s.pull(t.Context(), "durable", base) }))
	check(t, s.Daemon.Stop())
	s.base = []kit.Pushed{base}
	return s
}

// visit has the daemon die at a point, starts it again, and verifies what there
// is, what can be had, and what can be taken away.
func (s *scene) visit(t *testing.T, point string) {
	l, base := s.lease(t), s.base
	if strings.HasPrefix(point, "birth.") {
		defer func(dir string) { s.dir = dir }(s.dir)
		s.dir, base = filepath.Join(s.mount, t.Name()), nil
	}
	acked := s.dieAt(t, l, point)
	recorded := s.recorded(t)
	for i, id := range s.image.ChainIDs {
		if (recorded[id.String()] != "") != (i < acked) {
			t.Errorf("containerd has recorded layers %v, want the first %d of %s", recorded, acked, s.image.Ref)
			break
		}
	}

	sn := start(t, s.next(t, ""))
	cleanUp(t, sn)
	// containerd may collect garbage at the same time.
	waitFor(t, 20*time.Second, func() error { return orphans(t, s.Daemon) })
	s.connected(t)
	for _, p := range append(base, s.image) {
		s.whole(t, p, recorded)
	}
	if err := unavailable(t, nil, func() error { return s.pull(t.Context(), "durable", s.image) }); err != nil {
		t.Errorf("pull again: %v", err)
	}
	recorded = s.recorded(t)
	for _, e := range kittest.Inspect(t, s.Daemon).Journal.Committed {
		if e.Strategy == "healed" || s.heals && e.Strategy != "syncfs, in Apply" {
			t.Errorf("layer %s was made durable by %q", e.ChainID, e.Strategy)
		}
	}
	for _, p := range append(base, s.image) {
		for _, id := range p.ChainIDs {
			if recorded[id.String()] == "" {
				t.Errorf("containerd has no snapshot %s of %s", id, p.Ref)
			}
		}
		s.whole(t, p, recorded)
	}
	check(t, l.release())
	if err := s.remove(t.Context(), s.image); err != nil {
		t.Errorf("remove the image: %v", err)
	}
	s.only(t, base...)
	check(t, s.Daemon.Stop())
}

// dieAt brings a daemon to a point and sees it die there. It returns how many
// layers of the image were acknowledged before and not removed.
func (s *scene) dieAt(t *testing.T, l lease, point string) (acked int) {
	t.Helper()
	// The second layer, so that there is a first one that was acknowledged; the
	// third one when the power goes too.
	count := 2
	if s.power {
		count = 3
	}
	switch operation, _, _ := strings.Cut(point, "."); operation {
	case "birth":
		s.dies(t, point, func(d *kit.Daemon) { check(t, d.Launch()) })
		return 0
	case "recover":
		// It needs something to recover: a Commit that was cut short, and a
		// directory without a row.
		s.dies(t, fmt.Sprintf("commit.recorded:%d", count), func(d *kit.Daemon) {
			sn := start(t, d)
			check(t, writeLayer(upper(t, must[mounts](t)(sn.Prepare(t.Context(), "orphan", ""))), 0))
			check(t, sn.Remove(t.Context(), "orphan"))
			s.live(t, l)
		})
		if rows, dirs := kittest.Inspect(t, s.Daemon).Snapshots, list(t, s.Daemon.Root, "snapshots"); len(dirs) <= len(rows) {
			t.Fatalf("directories %v for %d rows: there is no orphan", dirs, len(rows))
		}
		s.dies(t, point, func(d *kit.Daemon) { check(t, d.Launch()) })
		return count - 1
	case "rewrite":
		s.dies(t, point, func(d *kit.Daemon) {
			start(t, d)
			// The fourth transaction is the Commit of the second layer.
			must[int](t)(s.disk.Inject(disk.Fault{
				Op: disk.OpWrite, Ranges: blocks(t, filepath.Join(d.Root, "metadata.db"))[:2],
				Skip: 3, Times: 1, Errno: syscall.EIO,
			}))
			s.live(t, l)
		})
		return 1
	case "prepare", "apply", "commit":
		s.dies(t, fmt.Sprintf("%s:%d", point, count), func(d *kit.Daemon) { start(t, d); s.live(t, l) })
		return count - 1
	case "update":
		s.dies(t, point, func(d *kit.Daemon) { start(t, d); s.live(t, l) })
		return len(s.image.ChainIDs)
	default: // removed
		s.dies(t, point, func(d *kit.Daemon) { start(t, d); s.live(t, l) })
		return 0
	}
}

// dies starts a daemon that ends itself at a point, and what brings it there.
func (s *scene) dies(t *testing.T, point string, work func(*kit.Daemon)) {
	t.Helper()
	d := s.next(t, must[string](t)(faulty()), "DURABLE_KILL_AT="+point)
	work(d)
	if code, err := d.Wait(2 * time.Minute); err != nil || code != -int(syscall.SIGKILL) {
		t.Fatalf("the daemon was not killed at %s: code %d, %v", point, code, err)
	}
	check(t, s.disk.Heal())
	if s.power {
		check(t, disk.Shutdown(s.mount))
		check(t, s.disk.Unmount())
		check(t, s.disk.DropCache())
		check(t, s.disk.Mount(disk.Ext4, s.mount))
	}
}

// live is what a daemon lives to see: an image is pulled, labelled and removed.
// It ends with the daemon.
func (s *scene) live(t *testing.T, l lease) {
	t.Helper()
	ctx, durable := t.Context(), s.client.SnapshotService("durable")
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"pull", func() error { return s.pull(l.ctx, "durable", s.image) }},
		{"label", func() error {
			_, err := durable.Update(ctx, snapshots.Info{Name: s.image.Top(), Labels: map[string]string{"containerd.io/snapshot/note": "new"}}, "labels")
			return err
		}},
		{"release", l.release},
		{"remove", func() error { return s.remove(ctx, s.image) }},
	} {
		if err := unavailable(t, s.Daemon.Done(), step.do); err != nil {
			// The daemon has ended, or will not.
			if _, gone := s.Daemon.Wait(time.Minute); gone != nil {
				t.Fatalf("%s: %v", step.what, err)
			}
			return
		}
	}
}

// lease keeps what containerd has pulled but not yet finished.
type lease struct {
	ctx     context.Context
	release func() error // may be called again
}

func (s *scene) lease(t *testing.T) lease {
	t.Helper()
	ctx, release, err := s.client.WithLease(t.Context())
	check(t, err)
	return lease{ctx, sync.OnceValue(func() error { return release(t.Context()) })}
}
