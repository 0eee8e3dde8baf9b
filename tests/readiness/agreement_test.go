package readiness

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestAgreementDefects: the tests see a daemon that keeps the keys that only containerd
// has, one that deletes names first, and one that leaves alone what was missed.
func TestAgreementDefects(t *testing.T) {
	t.Run("abandoned-keys-kept", func(t *testing.T) {
		n := newNodeWith(t, nodeOptions{acts: true, mutant: "abandoned-keys-kept"})
		if len(n.past(t, byClient, true)) == 0 {
			t.Error("not seen")
		}
	})
	t.Run("drop-names-first", func(t *testing.T) {
		n := newNodeWith(t, nodeOptions{acts: true, mutant: "drop-names-first"})
		if n.refused(t); len(n.names(t, n.app)) > 0 {
			t.Error("not seen")
		}
	})
	t.Run("taken-is-refused", func(t *testing.T) {
		// A daemon that acts has containerd collect, for which containerd gives out numbers.
		n := newNodeWith(t, nodeOptions{mutant: "taken-is-refused"})
		check(t, n.pull(t, n.app))
		check(t, n.Containerd.Stop())
		check(t, os.Remove(filepath.Join(n.Containerd.Root, "io.containerd.metadata.v1.bolt/meta.db")))
		n.restart(t)
		err := n.pull(t, n.app)
		ctx, cl := n.client(t)
		_, missing := cl.SnapshotService("durable").Stat(ctx, n.app.Top())
		if t.Logf("pull: %v; its snapshot: %v", err, missing); err == nil && missing == nil {
			t.Error("not seen")
		}
	})
	t.Run("prepare-waits", func(t *testing.T) {
		n := newNodeWith(t, nodeOptions{acts: true, mutant: "prepare-waits"})
		check(t, n.pull(t, n.app))
		blob, release := slow(t, n.Blob(n.app.Layers[1].Digest))
		defer release()
		check(t, os.RemoveAll(n.directories(t, n.app)[1]))
		ctx, cl := n.client(t)
		ctx, drop, err := cl.WithLease(ctx)
		check(t, err)
		defer func() { check(t, drop(context.WithoutCancel(ctx))) }()
		answered := make(chan error, 1)
		go func() {
			_, err := cl.SnapshotService("durable").Prepare(ctx, "waits", n.app.ChainIDs[1].String())
			answered <- err
		}()
		receive(t, "read of the blob", blob.read)
		select {
		case err := <-answered:
			t.Errorf("not seen: %v", err)
		case <-time.After(5 * time.Second): // it answers after one second otherwise
		}
		release()
		t.Logf("answered after the heal: %v", receive(t, "the answer", answered))
	})
	t.Run("stale-links-hold", func(t *testing.T) {
		n := newNodeWith(t, nodeOptions{acts: true, mutant: "stale-links-hold"})
		n.linked(t, 2)
		n.lose(t, n.app)
		_ = n.pull(t, n.app)
		waitFor(t, time.Minute, func() error {
			if log := must[string](t)(n.Daemon.Log()); !strings.Contains(log, "cannot remove snapshot with child") {
				return errors.New("not seen")
			}
			return nil
		})
	})
	t.Run("missed-stays", func(t *testing.T) {
		n := newNodeWith(t, nodeOptions{acts: true, mutant: "missed-stays"})
		if rows := n.missed(t); len(rows) == 0 {
			t.Error("not seen")
		}
	})
}
