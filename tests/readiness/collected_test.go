package readiness

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"google.golang.org/grpc/codes"

	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// TestDropLeaseEnds: the lease of a drop is deleted when the layer is committed again,
// also by a daemon that was started after the drop, or after that Commit.
func TestDropLeaseEnds(t *testing.T) {
	t.Parallel()
	for _, restart := range []string{"none", "before the pull", "after the pull"} {
		t.Run(strings.ReplaceAll(restart, " ", "-"), func(t *testing.T) {
			n := newNodeWith(t, nodeOptions{acts: true})
			check(t, n.pull(t, n.app))
			if restart == "none" {
				n.lose(t, n.app)
				if err := n.pull(t, n.app); err == nil {
					t.Fatal("a pull succeeds without the layer")
				}
				waitFor(t, time.Minute, func() error {
					if names := n.names(t, n.app); len(names) > 0 {
						return fmt.Errorf("still there: %q", names)
					}
					return nil
				})
			} else {
				// By another hand, so that the daemon does not know of it.
				waitSettled(t, n.Daemon, 0)
				n.damage(t, n.app, 1)
				check(t, os.Remove(n.Blob(n.app.Layers[1].Digest)))
				must[repull.Dropped](t)(n.drop(t, n.app, 1))
				n.between.answerWith(codes.OK)
			}
			if leases := n.dropLeases(t); len(leases) != 1 {
				t.Fatalf("leases after a drop: %q", leases)
			}
			if restart == "before the pull" {
				since := logged(t, n.Daemon)
				check(t, n.Daemon.Restart(t.Context()))
				waitSettled(t, n.Daemon, since)
			}
			waitFor(t, time.Minute, func() error { return n.pull(t, n.app) })
			if restart == "after the pull" {
				check(t, n.Daemon.Restart(t.Context()))
			}
			n.waitNoDropLease(t, "the pull is done")
			n.prints(t, n.app, "third layer\n")
			n.wantNothing(t)
		})
	}
}

// waitSettled waits until the daemon has had containerd collect, as after each start, or
// has found that there is nothing to collect. since is the length of the log before.
func waitSettled(t *testing.T, d *kit.Daemon, since int) string {
	t.Helper()
	var line string
	waitFor(t, time.Minute, func() error {
		for l := range strings.Lines(must[string](t)(d.Log())[since:]) {
			if strings.Contains(l, "collect") && strings.Contains(l, "while this daemon was down") {
				line = l
				return nil
			}
		}
		return errors.New("containerd was not called to collect")
	})
	return line
}

func logged(t *testing.T, d *kit.Daemon) int { return len(must[string](t)(d.Log())) }

// missed pulls app and removes it while the daemon is down, so that containerd forgets
// that its snapshots are to be deleted. It returns what the daemon has of them after its
// next start.
func (n *node) missed(t *testing.T) (rows []string) {
	t.Helper()
	check(t, n.pull(t, n.app))
	waitSettled(t, n.Daemon, 0)
	check(t, n.Daemon.Stop())
	ctx, cl := n.client(t)
	for _, name := range n.names(t, n.app) {
		check(t, cl.ImageService().Delete(ctx, name))
	}
	n.collect(t)
	if dirs := must[[]os.DirEntry](t)(os.ReadDir(filepath.Join(n.Daemon.Root, "snapshots"))); len(dirs) < len(n.app.Layers) {
		t.Fatalf("directories that containerd could not have deleted: %v", dirs)
	}
	since := logged(t, n.Daemon)
	check(t, n.Daemon.Start(t.Context()))
	if line := waitSettled(t, n.Daemon, since); !strings.Contains(line, "containerd has collected") {
		t.Error(line)
	}
	return n.rows(t)
}

// TestCollectedWhileDown: what containerd could not delete while the daemon was down goes
// after its next start, without any other removal.
func TestCollectedWhileDown(t *testing.T) {
	t.Parallel()
	for _, rebase := range []bool{false, true} {
		t.Run(fmt.Sprintf("rebase=%v", rebase), func(t *testing.T) {
			n := newNodeWith(t, nodeOptions{acts: true, rebase: rebase})
			if rows := n.missed(t); len(rows) > 0 {
				t.Errorf("after a start, and a collection, there are %q", rows)
			}
			n.waitEmpty(t)
			check(t, n.pull(t, n.app))
			n.prints(t, n.app, "third layer\n")
		})
	}
}

// TestCollectSpares: a daemon whose snapshots another client than containerd has made
// does not have them collected.
func TestCollectSpares(t *testing.T) {
	t.Parallel()
	n := newNodeWith(t, nodeOptions{acts: true})
	waitSettled(t, n.Daemon, 0)
	sn := must[snapshots.Snapshotter](t)(n.Daemon.Snapshotter())
	must[[]mount.Mount](t)(sn.Prepare(t.Context(), "by hand", ""))
	check(t, sn.Close())
	since := logged(t, n.Daemon)
	check(t, n.Daemon.Restart(t.Context()))
	if line := waitSettled(t, n.Daemon, since); !strings.Contains(line, "is of another client than containerd") {
		t.Error(line)
	}
	if rows := n.rows(t); !slices.Contains(rows, "by hand") {
		t.Errorf("rows %q", rows)
	}
}
