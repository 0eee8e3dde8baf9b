package commit

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// layers is the length of the chain that the disk is to spoil.
const layers = 3

// pass is one try to unpack a chain on a disk that fails. What it finds wrong it
// collects: the same pass over a daemon with a planted mistake must find
// something.
type pass struct {
	*ailing
	want   []kit.Tree
	acked  map[string]int // committed names, and the number of the layer
	maybe  map[string]int // those whose transaction was answered with an error
	failed bool           // a call failed
	wrong  []string
}

func newPass(a *ailing, want []kit.Tree) *pass {
	return &pass{ailing: a, want: want, acked: map[string]int{}, maybe: map[string]int{}}
}

func (p *pass) errorf(format string, args ...any) {
	p.wrong = append(p.wrong, fmt.Sprintf(format, args...))
}

// bystander is an active snapshot that has data in flight while others are
// committed.
var bystander = link{number: 0, key: "default/50/bystander", name: "default/51/bystander"}

// run returns how many requests the fault has hit.
func (p *pass) run(t *testing.T, f disk.Fault) (hits int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	sn := p.begin(t)
	check(t, writeLayer(upper(t, must[mounts](t)(sn.Prepare(ctx, bystander.key, ""))), bystander.number))

	p.strike(t, f)
	refused := p.unpack(ctx, sn)
	hits = p.hits(t)
	p.answers(t, ctx, sn)
	check(t, p.Heal())

	// Once more, now that the disk is well.
	for _, l := range refused {
		if err := l.commit(ctx, sn); err == nil {
			p.errorf("I4: %s was committed after its Commit had failed", l.key)
		}
	}
	// A Commit that failed concerns every client that had data in flight.
	switch err := p.commit(ctx, sn, bystander); {
	case err == nil && len(refused) > 0:
		p.errorf("I4: the bystander was committed although the Commit of %s had failed", refused[0].key)
	case err != nil && hits == 0:
		p.errorf("commit on a healthy disk: %v", err)
	}
	p.answers(t, ctx, sn)
	p.whole(t, ctx, sn, "before the boot")
	p.cut(t, f.Times == 0)
	p.afterBoot(t, ctx, append(refused, bystander))
	p.cut(t, true)
	return hits
}

// unpack goes on after a failure, as containerd does with other images, and
// returns the snapshots whose Commit failed.
func (p *pass) unpack(ctx context.Context, sn snapshots.Snapshotter) (refused []link) {
	for _, l := range chain(layers, "first") {
		dir, err := l.prepare(ctx, sn)
		if err == nil {
			err = writeLayer(dir, l.number)
		}
		if err == nil {
			if err = p.commit(ctx, sn, l); err != nil {
				refused = append(refused, l)
			}
		}
		p.failed = p.failed || err != nil
	}
	return refused
}

// commit commits and remembers what was answered.
func (p *pass) commit(ctx context.Context, sn snapshots.Snapshotter, l link) error {
	err := l.commit(ctx, sn)
	switch {
	case err == nil:
		p.acked[l.name] = l.number
	case strings.Contains(err.Error(), "metadata.db was not written"):
		p.maybe[l.name] = l.number
	}
	return err
}

// answers checks that the daemon lives, and that its health agrees with
// whether it takes writes.
func (p *pass) answers(t *testing.T, ctx context.Context, sn snapshots.Snapshotter) {
	t.Helper()
	log := must[string](t)(p.daemon.Log())
	for _, bad := range []string{"panic: ", "fatal error: ", "unexpected fault address"} {
		if strings.Contains(log, bad) {
			p.errorf("the log has %q: %s", bad, p.daemon.LogTail(8192))
		}
	}
	if !p.daemon.Running() {
		p.errorf("the daemon has ended: %s", p.daemon.LogTail(4096))
		return
	}
	seen := map[string]bool{}
	if err := sn.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		seen[info.Name] = true
		return nil
	}); err != nil {
		p.errorf("walk: %v", err)
	}
	for name := range p.acked {
		if !seen[name] {
			p.errorf("I3: walk does not list %s", name)
		}
	}
	// Cleanup checks first whether anything may be written, and changes nothing
	// that matters here.
	err := sn.(snapshots.Cleaner).Cleanup(ctx)
	health := p.daemon.Healthy(ctx)
	if errdefs.IsUnavailable(err) != (health != nil) {
		p.errorf("cleanup: %v, but health: %v", err, health)
	}
}

// whole checks that every acknowledged layer is there and is what was written.
func (p *pass) whole(t *testing.T, ctx context.Context, sn snapshots.Snapshotter, when string) {
	t.Helper()
	r, err := p.daemon.Inspect(t.Context())
	if err != nil {
		p.errorf("%s: %v", when, err)
	}
	for name, n := range p.acked {
		info, err := sn.Stat(ctx, name)
		row, ok := r.Find(name)
		if err != nil || info.Kind != snapshots.KindCommitted || !ok {
			p.errorf("I1: %s: %s is %v, %v, on record: %t; want it committed", when, name, info.Kind, err, ok)
			continue
		}
		err = compare(p.daemon.LayerDir(row.ID), p.want[n])
		if errors.Is(err, syscall.EIO) && p.daemon.Healthy(ctx) != nil {
			continue // btrfs reads nothing that it could not write until it is mounted again
		}
		if err != nil {
			p.errorf("I1: %s: %s is not whole: %v", when, name, err)
		}
	}
}

// afterBoot checks what the next boot makes of it, and that what is missing can
// be had.
func (p *pass) afterBoot(t *testing.T, ctx context.Context, refused []link) {
	t.Helper()
	sn, err := p.boot(t)
	if err != nil {
		p.errorf("after the boot: %v", err)
		return
	}
	for _, l := range refused {
		if _, ok := p.acked[l.name]; ok {
			continue
		}
		info, err := sn.Stat(ctx, l.name)
		n, maybe := p.maybe[l.name]
		switch {
		case errdefs.IsNotFound(err):
		case err == nil && maybe:
			// The error came after the last sync of the layer, and perhaps
			// after the disk had the row: then it must be whole (I2).
			p.acked[l.name] = n
		default:
			p.errorf("I4: after the boot %s is %v, %v, although its sync failed", l.name, info.Kind, err)
		}
	}
	p.whole(t, ctx, sn, "after the boot")
	for _, l := range chain(layers, "again") {
		if _, ok := p.acked[l.name]; ok {
			continue
		}
		if err := l.unpack(ctx, sn); err != nil {
			p.errorf("unpack layer %d again after the boot: %v", l.number, err)
			return
		}
		p.acked[l.name] = l.number
	}
	p.whole(t, ctx, sn, "extracted again")
	cleanUp(t, sn)
	noOrphans(t, p.daemon)
}
