package damage

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// uncleanShutdown is what daemon and containerd see of a power cut that took nothing:
// they had no time to end, and the next ones run in another boot.
func (n *node) uncleanShutdown(t *testing.T) {
	t.Helper()
	check(t, n.Containerd.Kill())
	check(t, n.Daemon.Kill())
	check(t, kit.NewBoot())
	check(t, n.Daemon.Start(t.Context()))
	check(t, n.Containerd.Start(t.Context()))
}

// TestHealedAtBoot does each damage to all layers, and cuts the power. Each call
// for the image in the next boot gets layers that are whole. No container
// runs: it would not have survived the cut.
//
// The damages of the content are missing: not all content is read at a boot,
// but TestNotReadAtBoot.
func TestHealedAtBoot(t *testing.T) {
	n := newNode(t, "ext4")
	for i := range catalogue {
		d := &catalogue[i]
		if d.deep || !kittest.Turn(i, 2) {
			continue
		}
		t.Run(d.name, func(t *testing.T) {
			for _, layer := range d.layers {
				check(t, d.inflict(n.root(layer), d.dir(layer)))
			}
			n.uncleanShutdown(t)
			n.startsAnew(t)
			n.wholeAfterBoot(t)
		})
	}
}

// TestGate does all damages at once to all layers, on each file system, or loses
// them, and cuts the power. Then it makes the first call in each way that
// containerd has.
func TestGate(t *testing.T) {
	queries := []struct {
		name string
		call func(t *testing.T, n *node)
	}{
		{"stat", func(t *testing.T, n *node) { n.readyToContainerd(t, len(layerNames)-1) }},
		{"prepare", func(t *testing.T, n *node) { n.startsAnew(t) }},
		{"view", func(t *testing.T, n *node) {
			n.ctr(t, "snapshot", "--snapshotter", "durable", "view", "first-view", n.image.Top())
			n.ctr(t, "snapshot", "--snapshotter", "durable", "rm", "first-view")
		}},
		{"mounts", func(t *testing.T, n *node) {
			n.ctr(t, "snapshot", "--snapshotter", "durable", "mounts", t.TempDir(), "prepared before")
		}},
	}
	losses := map[string]func(t *testing.T, n *node){
		"damaged": func(t *testing.T, n *node) { n.inflictAll(t) },
		"gone": func(t *testing.T, n *node) {
			for _, layer := range layerNames {
				n.remove(t, n.dir(layer))
			}
		},
	}
	for _, fs := range fileSystems {
		t.Run(fs, func(t *testing.T) {
			n := newNode(t, fs)
			n.ctr(t, "snapshot", "--snapshotter", "durable", "prepare", "prepared before", n.image.Top())
			for i, q := range queries {
				for name, lose := range losses {
					if fs != "ext4" && !kittest.Turn(i, 2) {
						continue
					}
					t.Run(q.name+" "+name, func(t *testing.T) {
						lose(t, n)
						n.uncleanShutdown(t)
						q.call(t, n)
						n.wholeAfterBoot(t)
					})
				}
			}
		})
	}
}

// TestGateForMany makes many calls at once for layers that are all damaged. All
// get layers that are whole, and each layer is extracted once.
func TestGateForMany(t *testing.T) {
	n := newNode(t, "ext4")
	sn := connect(t, n.Daemon)
	var names []string
	for _, r := range n.check(t, 0) {
		names = append(names, r.Name)
	}
	check(t, sn.Close())
	damaged := n.inflictAll(t)
	start := len(must[string](t)(n.Daemon.Log()))
	n.uncleanShutdown(t)

	sn = connect(t, n.Daemon)
	errs := make([]error, 40)
	var callers sync.WaitGroup
	for i := range errs {
		callers.Go(func() {
			name := names[i/4%len(names)]
			switch i % 4 {
			case 0, 1:
				_, errs[i] = sn.Stat(t.Context(), name)
			case 2:
				_, errs[i] = sn.Prepare(t.Context(), fmt.Sprintf("caller-%d", i), name)
			case 3:
				_, errs[i] = sn.View(t.Context(), fmt.Sprintf("caller-%d", i), name)
			}
		})
	}
	callers.Wait()
	check(t, errors.Join(errs...))
	n.wholeAfterBoot(t)
	if healed := strings.Count(must[string](t)(n.Daemon.Log())[start:], "extracted again from its blob"); healed != len(damaged) {
		t.Errorf("%d layers were extracted again, want %d", healed, len(damaged))
	}
}

// wholeAfterBoot: the layers of the image are whole and reported as ready, and
// nothing of earlier boots is kept.
func (n *node) wholeAfterBoot(t *testing.T) {
	t.Helper()
	n.whole(t)
	n.clean(t, "--cached")
	n.clean(t)
	replaced, err := os.ReadDir(n.Daemon.Root + "/replaced")
	if !os.IsNotExist(err) { // nothing was there to be replaced
		check(t, err)
	}
	boot := strings.TrimSpace(string(must[[]byte](t)(os.ReadFile("/proc/sys/kernel/random/boot_id"))))
	for _, e := range replaced {
		if !strings.Contains(e.Name(), boot) {
			t.Errorf("replaced/%s is of an earlier boot, and no mount can use it", e.Name())
		}
	}
}

// TestNotReadAtBoot: damages of the content are not found at a boot, by which
// digests are not lost, and are found by a verb that reads the content.
func TestNotReadAtBoot(t *testing.T) {
	n := newNode(t, "ext4")
	n.digested(t)
	want := map[string][]kit.Finding{}
	for layer, d := range damages() {
		if d.deep {
			check(t, d.inflict(n.root(layer), d.dir(layer)))
			want[layer] = append(want[layer], d.expected(d.dir(layer))...)
		}
	}
	n.uncleanShutdown(t)
	n.startsAnew(t)
	n.clean(t, "--cached")
	n.digested(t)
	n.finds(t, want, "--deep")
	n.heals(t, want, "--deep")
	n.clean(t, "--deep")
	n.wholeAfterBoot(t)
}
