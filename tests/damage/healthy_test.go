package damage

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

const (
	healthyChains = 16 // of
	chainLength   = 25 // layers each
	healthyLayers = healthyChains * chainLength
)

// TestNoFalseAlarm makes 400 layers of all that file systems can hold on each
// of them, puts some to use, and has them verified, metadata and content: with
// the daemon running and stopped, after a clean restart and an unclean shutdown.
// All are ready, always.
//
// No image stands behind these layers, so that content is compared with digests.
// The daemon takes those some time after the Commits; the file systems go side by
// side, so that the test waits for it once.
func TestNoFalseAlarm(t *testing.T) {
	var all []*healthy
	for i, fs := range fileSystems {
		h := &healthy{fs: fs, daemon: startDaemon(t, newDisk(t, fs), kit.DaemonOptions{})}
		h.names = makeLayers(t, h.daemon, uint64(i))
		use(t, h.daemon, h.names)
		all = append(all, h)
	}
	each := func(when string, do func(t *testing.T, h *healthy)) {
		t.Helper()
		t.Run(when, func(t *testing.T) {
			for _, h := range all {
				t.Run(h.fs, func(t *testing.T) {
					t.Parallel()
					do(t, h)
				})
			}
		})
	}
	each("fresh", func(t *testing.T, h *healthy) { h.noAlarm(t) })
	each("with content digests", func(t *testing.T, h *healthy) {
		waitDigested(t, h.daemon, healthyLayers)
		h.noAlarm(t, "--deep")
	})
	each("clean restart", func(t *testing.T, h *healthy) {
		check(t, h.daemon.Restart(t.Context()))
		h.noAlarm(t, "--cached")
		h.allReady(t)
		check(t, h.daemon.Kill())
	})
	check(t, kit.NewBoot())
	each("unclean shutdown", func(t *testing.T, h *healthy) {
		h.allUnverified(t)
		check(t, h.daemon.Start(t.Context()))
		h.allReady(t)
	})
	each("stopped", func(t *testing.T, h *healthy) {
		check(t, h.daemon.Stop())
		h.noAlarm(t)
		if scrub := kittest.Inspect(t, h.daemon).Journal.Scrub; !scrub.Started.IsZero() {
			t.Errorf("layers were scrubbed, which is not configured: %+v", scrub)
		}
	})
}

// healthy is a daemon with layers that are whole.
type healthy struct {
	fs     string
	daemon *kit.Daemon
	names  []string
}

// allReady calls Stat of each layer, as containerd does, and then runs check.
func (h *healthy) allReady(t *testing.T) {
	t.Helper()
	sn := connect(t, h.daemon)
	for _, name := range h.names {
		if info, err := sn.Stat(t.Context(), name); err != nil || info.Kind != snapshots.KindCommitted {
			t.Errorf("stat %q: %v, %v", name, info.Kind, err)
		}
	}
	h.noAlarm(t, "--cached")
	h.noAlarm(t, "--deep") // which verifies metadata first
}

func (h *healthy) noAlarm(t *testing.T, args ...string) {
	t.Helper()
	allAre(t, "ready", args, runCheck(t, h.daemon, 0, args...))
}

// allUnverified: nothing that was known before an unclean shutdown counts after it.
func (h *healthy) allUnverified(t *testing.T) {
	t.Helper()
	args := []string{"--cached"}
	allAre(t, "unverified", args, runCheck(t, h.daemon, 3, args...))
}

func allAre(t *testing.T, state string, args []string, results []kit.Verdict) {
	t.Helper()
	if len(results) != healthyLayers {
		t.Errorf("check %q: %d layers verified, want %d", args, len(results), healthyLayers)
	}
	alarms := 0
	for _, r := range results {
		if r.State == state && len(r.Findings) == 0 && r.Reason == "" {
			continue
		}
		if alarms++; alarms <= 5 {
			t.Errorf("check %q: not %s: %+v", args, state, r)
		}
	}
	if alarms > 0 {
		t.Errorf("check %q: %d layers are not %s", args, alarms, state)
	}
}

func connect(t *testing.T, d *kit.Daemon) snapshots.Snapshotter {
	t.Helper()
	sn := must[snapshots.Snapshotter](t)(d.Snapshotter())
	t.Cleanup(func() { sn.Close() })
	return sn
}

// makeLayers commits the layers, some chains side by side, and returns their
// names.
func makeLayers(t *testing.T, d *kit.Daemon, seed uint64) []string {
	t.Helper()
	sn := connect(t, d)
	names := make([]string, healthyLayers)
	errs := make([]error, healthyChains)
	var running sync.WaitGroup
	slots := make(chan struct{}, 4)
	for c := range healthyChains {
		running.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			parent := ""
			for i := range chainLength {
				n := c*chainLength + i
				if names[n], errs[c] = makeLayer(t.Context(), sn, parent, seed, uint64(n)); errs[c] != nil {
					return
				}
				parent = names[n]
			}
		})
	}
	running.Wait()
	check(t, errors.Join(errs...))
	return names
}

// makeLayer commits one layer under the names that containerd would use. Every
// third is written by a container through its mount, the others as an
// extraction, into the directory.
func makeLayer(ctx context.Context, sn snapshots.Snapshotter, parent string, seed, n uint64) (name string, err error) {
	chainID := fmt.Sprintf("sha256:%x", sha256.Sum256(fmt.Appendf(nil, "%d/%d", seed, n)))
	key, name := fmt.Sprintf("default/%d/extract-%d %s", n, n, chainID), fmt.Sprintf("default/%d/%s", n, chainID)
	through := n%3 == 2
	var opts []snapshots.Opt
	if through {
		key = fmt.Sprintf("default/%d/build", n)
	} else {
		opts = append(opts, snapshots.WithLabels(map[string]string{"containerd.io/snapshot.ref": chainID}))
	}
	mounts, err := sn.Prepare(ctx, key, parent, opts...)
	if err != nil {
		return "", err
	}
	if through {
		err = mount.WithTempMount(ctx, mounts, func(root string) error {
			return change(root, rand.New(rand.NewPCG(seed, n)))
		})
	} else {
		err = writeLayer(upperOf(mounts), seed, n)
	}
	if err != nil {
		return "", err
	}
	return name, sn.Commit(ctx, name, key)
}

// upperOf is the directory that an extraction is written to.
func upperOf(mounts []mount.Mount) string {
	for _, o := range mounts[0].Options {
		if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
			return dir
		}
	}
	return mounts[0].Source // of a bind mount
}

// use mounts the top of some chains for the rest of the test, as containers have
// them, reads them, and changes what they show.
func use(t *testing.T, d *kit.Daemon, names []string) {
	t.Helper()
	sn := connect(t, d)
	for c := 0; c < healthyChains; c += 8 {
		key := fmt.Sprintf("default/%d/container", c)
		mounts, err := sn.Prepare(t.Context(), key, names[c*chainLength+chainLength-1])
		check(t, err)
		root := must[string](t)(os.MkdirTemp("", "c"))
		check(t, mount.All(mounts, root))
		t.Cleanup(func() {
			if err := mount.UnmountAll(root, 0); err != nil {
				t.Error(err)
			}
		})
		_ = must[kit.Tree](t)(kit.Fingerprint(root))
		check(t, change(root, rand.New(rand.NewPCG(9, uint64(c)))))
	}
}
