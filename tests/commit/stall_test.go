package commit

import (
	"context"
	"flag"
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

var stall = flag.Duration("stall", 3*time.Second, "how long a disk does not answer; a bad cable takes 30s")

// TestStalledDisk has a disk that takes its time for one request of each kind. A
// Commit waits for it, and is no less true; a call that only reads does not wait.
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
					// A machine with other work needs more time for three questions.
					for try, inTime := 0, false; !inTime; try++ {
						if try == 4 {
							t.Fatalf("three questions were not answered while the disk stalled for %v", f.Stall/2)
						}
						p := newPass(a, want)
						inTime = p.wait(t, f)
						for _, wrong := range p.wrong {
							t.Error(wrong)
						}
						f.Stall *= 2
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

// wait reports whether there was time for the questions while the disk did not
// answer.
func (p *pass) wait(t *testing.T, f disk.Fault) (inTime bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*f.Stall+5*time.Minute)
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
	answered := time.Since(begin)
	if err := <-committed; err != nil {
		p.errorf("commit on a slow disk: %v", err)
	}
	if took := time.Since(begin); took < f.Stall {
		p.errorf("the Commit was answered after %v, the disk after %v", took, f.Stall)
	}
	p.cut(t, false)
	p.afterBoot(t, ctx, nil)
	p.cut(t, true)
	return answered < f.Stall
}

// TestStopDuringLongCommit: the disk does not answer for longer than a stop may
// take. The Commit fails for its client in time, and its layer is not there after
// the restart, or is there as a whole. The process itself ends when the kernel
// lets it.
func TestStopDuringLongCommit(t *testing.T) {
	const stall = 12 * time.Second
	a := newAiling(t, disk.Ext4, kit.DaemonOptions{})
	f := a.kinds()[0].fault
	f.Times, f.Errno, f.Stall = 1, 0, stall
	p := newPass(a, reference(t, layers))
	ctx, cancel := context.WithTimeout(t.Context(), 3*stall+time.Minute)
	defer cancel()
	sn := p.begin(t)
	links := chain(layers, "first")
	stalled, committed := p.stalled(t, ctx, sn, links, f)
	check(t, syscall.Kill(p.daemon.PID(), syscall.SIGTERM))
	signaled := time.Now()
	if err := <-committed; err == nil {
		t.Error("the Commit was acknowledged before the disk had answered")
	}
	if took := time.Since(signaled); took > 10*time.Second || time.Since(stalled) > stall {
		t.Errorf("the client had its answer after %v", took)
	}
	if _, err := p.daemon.Wait(time.Minute); err != nil {
		t.Fatal(err)
	}
	sn = start(t, p.daemon)
	if info, err := sn.Stat(ctx, links[0].name); err != nil || info.Kind != snapshots.KindCommitted {
		t.Errorf("an earlier layer after the restart: %v, %v", info.Kind, err)
	}
	if info, err := sn.Stat(ctx, links[1].name); err == nil {
		id, _ := kittest.Inspect(t, p.daemon).Find(info.Name)
		sameTree(t, info.Name, p.daemon.LayerDir(id.ID), reference(t, layers)[1])
	} else if !errdefs.IsNotFound(err) {
		t.Errorf("the layer of the Commit after the restart: %v", err)
	}
}
