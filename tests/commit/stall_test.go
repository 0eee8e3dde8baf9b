package commit

import (
	"context"
	"flag"
	"fmt"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

var stall = flag.Duration("stall", 3*time.Second, "how long a disk does not answer; a bad cable takes 30s")

// TestStalledDisk has a disk that takes its time for one request of each kind. A
// Commit waits for it, and is no less true; who only asks does not wait.
func TestStalledDisk(t *testing.T) {
	want := reference(t, layers)
	for _, fs := range []disk.FS{disk.Ext4, disk.XFS, disk.Btrfs} {
		t.Run(string(fs), func(t *testing.T) {
			t.Parallel()
			a := newAiling(t, fs, kit.DaemonOptions{})
			for _, kind := range a.kinds()[:3] {
				t.Run(kind.name, func(t *testing.T) {
					f := kind.fault
					f.Times, f.Errno, f.Stall = 1, 0, *stall
					p := newPass(a, want)
					p.wait(t, f)
					for _, wrong := range p.wrong {
						t.Error(wrong)
					}
				})
			}
		})
	}
}

// TestStopDuringCommit: SIGTERM reaches a daemon that waits for the disk in the
// middle of a Commit. It finishes what is in flight, and ends after that.
func TestStopDuringCommit(t *testing.T) {
	a := newAiling(t, disk.Ext4, kit.DaemonOptions{})
	f := a.kinds()[0].fault
	f.Times, f.Errno, f.Stall = 1, 0, *stall
	p := newPass(a, reference(t, layers))
	ctx, cancel := context.WithTimeout(t.Context(), 3**stall+time.Minute)
	defer cancel()
	sn := p.begin(t)
	links := chain(layers, "first")
	_, committed := p.stalled(t, ctx, sn, links, f)
	check(t, p.daemon.Stop())
	if err := <-committed; err != nil {
		t.Errorf("the Commit was in flight when the daemon was stopped: %v", err)
	}
	sn = start(t, p.daemon)
	if info, err := sn.Stat(ctx, links[1].name); err != nil || info.Kind != snapshots.KindCommitted {
		t.Errorf("after the restart: %v, %v", info.Kind, err)
	}
	p.cut(t, true)
	for _, wrong := range p.wrong {
		t.Error(wrong)
	}
}

// stalled commits the first layer, and returns when the disk stalls in the
// Commit of the second, which began at begin.
func (p *pass) stalled(t *testing.T, ctx context.Context, sn snapshots.Snapshotter, links []link, f disk.Fault) (begin time.Time, _ <-chan error) {
	t.Helper()
	if err := links[0].unpack(ctx, sn); err != nil {
		t.Fatal(err)
	}
	p.acked[links[0].name] = 0
	check(t, writeLayer(must[string](t)(links[1].prepare(ctx, sn)), 1))

	p.strike(t, f)
	begin = time.Now()
	committed := make(chan error, 1)
	go func() { committed <- p.commit(ctx, sn, links[1]) }()
	waitFor(t, 20*time.Second, func() error {
		if p.hits(t) == 0 {
			return fmt.Errorf("the Commit has sent nothing of the kind to the disk")
		}
		return nil
	})
	return begin, committed
}

func (p *pass) wait(t *testing.T, f disk.Fault) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3**stall+time.Minute)
	defer cancel()
	sn := p.begin(t)
	links := chain(layers, "first")
	begin, committed := p.stalled(t, ctx, sn, links, f)
	if info, err := sn.Stat(ctx, links[0].name); err != nil || info.Kind != snapshots.KindCommitted {
		p.errorf("stat while the disk stalls: %v, %v", info.Kind, err)
	}
	if err := sn.Walk(ctx, func(context.Context, snapshots.Info) error { return nil }); err != nil {
		p.errorf("walk while the disk stalls: %v", err)
	}
	if err := p.daemon.Healthy(ctx); err != nil {
		p.errorf("health while the disk stalls: %v", err)
	}
	select {
	case err := <-committed:
		t.Fatalf("the Commit (%v) was answered before three questions were", err)
	default:
	}
	if err := <-committed; err != nil {
		p.errorf("commit on a slow disk: %v", err)
	}
	if took := time.Since(begin); took < *stall {
		p.errorf("the Commit was answered after %v, the disk after %v", took, *stall)
	}
	p.cut(t, false)
	p.afterBoot(t, ctx, nil)
	p.cut(t, true)
}
