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
)

const (
	healthyChains = 40 // of
	chainLength   = 25 // layers each
	healthyLayers = healthyChains * chainLength
)

// TestNoFalseAlarm makes 1,000 layers of all that file systems can hold, puts
// some of them to use, and has them looked at: with the daemon running and
// stopped, after clean restarts and after unclean boots. All are ready, always.
func TestNoFalseAlarm(t *testing.T) {
	for i, fs := range fileSystems {
		t.Run(fs, func(t *testing.T) {
			d := startDaemon(t, newDisk(t, fs))
			names := makeLayers(t, d, uint64(i))
			allReady := func(when string) {
				t.Helper()
				sn := connect(t, d)
				for _, name := range names {
					if info, err := sn.Stat(t.Context(), name); err != nil || info.Kind != snapshots.KindCommitted {
						t.Errorf("%s: stat %q: %v, %v", when, name, info.Kind, err)
					}
				}
				check(t, sn.Close())
				noAlarm(t, d, when)
			}
			allReady("fresh")
			use(t, d, names)
			allReady("in use")
			for n := 1; n <= 3; n++ {
				check(t, d.Restart(t.Context()))
				allReady(fmt.Sprintf("after clean restart %d", n))
				uncleanBoot(t, d)
				allReady(fmt.Sprintf("after unclean boot %d", n))
			}
			check(t, d.Stop())
			noAlarm(t, d, "stopped")
		})
	}
}

func noAlarm(t *testing.T, d *kit.Daemon, when string) {
	t.Helper()
	results := runCheck(t, d, 0)
	if len(results) != healthyLayers {
		t.Errorf("%s: %d layers looked at, want %d", when, len(results), healthyLayers)
	}
	alarms := 0
	for _, r := range results {
		if r.State == "ready" && len(r.Findings) == 0 && r.Reason == "" {
			continue
		}
		if alarms++; alarms <= 5 {
			t.Errorf("%s: a false alarm: %+v", when, r)
		}
	}
	if alarms > 0 {
		t.Errorf("%s: %d false alarms", when, alarms)
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
