package commit

import (
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestAfterFailedWrite has the k-th write of a transaction fail, and transactions
// that follow it. On ext4, what is written to a page whose first write had failed
// never arrives, although its sync succeeds: the power cut at the end would show
// it.
func TestAfterFailedWrite(t *testing.T) {
	for _, fs := range []disk.FS{disk.Ext4, disk.XFS, disk.Btrfs} {
		t.Run(string(fs), func(t *testing.T) {
			a := newAiling(t, fs, kit.DaemonOptions{})
			if failed, _ := a.failUpdates(t); failed == 0 {
				t.Error("no transaction failed")
			}
		})
	}
}

// TestRestartAfterFailedWrite has the daemon die of it, before it has drawn its
// consequences. The next one, under the same kernel, must not trust the page
// cache: what it reads there is not what is on disk.
func TestRestartAfterFailedWrite(t *testing.T) {
	for _, fs := range []disk.FS{disk.Ext4, disk.XFS, disk.Btrfs} {
		t.Run(string(fs), func(t *testing.T) {
			a := newAiling(t, fs, kit.DaemonOptions{Binary: must[string](t)(faulty()), Env: []string{"DURABLE_KILL_AT=rewrite.written"}})
			if _, died := a.failUpdates(t); died == 0 {
				t.Error("the daemon never died: no transaction failed")
			}
		})
	}
}

// failUpdates lets each write of an update fail in turn, on xfs and btrfs in make test
// every fourth. It returns in how many
// passes the update failed, and in how many the daemon died of it.
func (a *ailing) failUpdates(t *testing.T) (failed, died int) {
	t.Helper()
	want := reference(t, layers)
	step := 1
	if a.fs != disk.Ext4 {
		step = kittest.Step(4)
	}
	for k := 0; ; k += step {
		p := newPass(a, want)
		hits := p.failUpdate(t, disk.Fault{Op: disk.OpWrite, Ranges: a.data, Skip: k, Times: 1, Errno: syscall.EIO}, &died)
		for _, wrong := range p.wrong {
			t.Errorf("write %d: %s", k, wrong)
		}
		if p.failed {
			failed++
		}
		if hits == 0 || t.Failed() {
			return failed, died
		}
	}
}

func (p *pass) failUpdate(t *testing.T, f disk.Fault, died *int) (hits int) {
	t.Helper()
	ctx := t.Context()
	sn := p.begin(t)
	links := chain(layers, "first")
	check(t, links[0].unpack(ctx, sn))
	p.acked[links[0].name] = 0

	// A label that needs many pages that no transaction has used before.
	p.strike(t, f)
	info := snapshots.Info{Name: links[0].name, Labels: kit.Labels(200_000)}
	_, err := sn.Update(ctx, info, "labels")
	hits = p.hits(t)
	check(t, p.Heal())
	if p.failed = err != nil; hits > 0 && !p.failed {
		p.errorf("an update whose write failed was acknowledged")
	}
	if errdefs.IsUnavailable(err) { // no daemon has answered
		if _, err := p.daemon.Wait(2 * time.Minute); err != nil {
			t.Fatal(err)
		}
		*died++
		sn = start(t, p.daemon)
	}
	waitFor(t, 30*time.Second, func() error { return p.daemon.Healthy(ctx) })
	p.whole(t, ctx, sn, "after the update")
	for _, l := range links[1:] {
		if err := l.unpack(ctx, sn); err != nil {
			p.errorf("unpack layer %d after the update: %v", l.number, err)
			break
		}
		p.acked[l.name] = l.number
	}
	p.cut(t, false)
	p.afterBoot(t, ctx, nil)
	p.cut(t, true)
	return hits
}
