package commit

import (
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// TestRestartAfterFailedWrite has the k-th write of a transaction fail and the
// daemon die of it, before it has drawn its consequences. The next one, under
// the same kernel, must not believe the page cache: what it reads there is not
// what is on disk, and on ext4 what it writes to a page whose first write had
// failed never arrives. The power cut at the end would show it.
func TestRestartAfterFailedWrite(t *testing.T) {
	want := reference(t, layers)
	for _, fs := range []disk.FS{disk.Ext4, disk.XFS, disk.Btrfs} {
		t.Run(string(fs), func(t *testing.T) {
			a := newAiling(t, fs, kit.DaemonOptions{Binary: must[string](t)(faulty()), Env: []string{"DURABLE_KILL_AT=rewrite.written"}})
			died := 0
			for k := 0; ; k++ {
				p := newPass(a, want)
				hits, dead := p.failAndRestart(t, disk.Fault{Op: disk.OpWrite, Ranges: a.data, Skip: k, Times: 1, Errno: syscall.EIO})
				for _, wrong := range p.wrong {
					t.Errorf("write %d: %s", k, wrong)
				}
				if dead {
					died++
				}
				if hits == 0 || t.Failed() {
					break
				}
			}
			if died == 0 {
				t.Error("the daemon never died: no transaction failed")
			}
		})
	}
}

func (p *pass) failAndRestart(t *testing.T, f disk.Fault) (hits int, dead bool) {
	t.Helper()
	ctx := t.Context()
	sn := p.begin(t)
	links := chain(layers, "first")
	check(t, links[0].unpack(ctx, sn))
	p.acked[links[0].name] = 0

	// A label that needs many pages that no transaction has used before.
	p.strike(t, f)
	info := snapshots.Info{Name: links[0].name, Labels: map[string]string{"large": strings.Repeat("x", 200_000)}}
	_, err := sn.Update(ctx, info, "labels.large")
	hits = p.hits(t)
	check(t, p.Heal())
	if hits > 0 && err == nil {
		p.errorf("an update whose write failed was acknowledged")
	}
	if dead = !p.daemon.Running(); !dead {
		kill(t, p.daemon)
	}

	sn = start(t, p.daemon)
	p.whole(t, ctx, sn, "after the restart")
	for _, l := range links[1:] {
		if err := l.unpack(ctx, sn); err != nil {
			p.errorf("unpack layer %d after the restart: %v", l.number, err)
			break
		}
		p.acked[l.name] = l.number
	}
	p.cut(t, false)
	p.afterBoot(t, ctx, nil)
	p.cut(t, true)
	return hits, dead
}
