package noharm

import (
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/defects"
)

// plantedDefect is a mistake planted in the daemon, see package defects, and what shows
// it.
type plantedDefect struct {
	mutant string
	node   nodeOptions
	shows  func(t testing.TB, n *node) problems
}

var plantedDefects = []plantedDefect{
	{"shallow-look-clears", nodeOptions{}, shallowLook},
	{"cannot-is-bad", nodeOptions{blobs: true}, func(t testing.TB, n *node) problems {
		return n.live(t, cycle{name: "cannot", allow: doubt, events: []event{
			{name: "descriptors-used-up", do: noDescriptors}, {name: "decompressor-killed", do: decompressorKilled},
		}})
	}},
	{"no-second-look", nodeOptions{blobs: true}, func(t testing.TB, n *node) problems {
		return n.live(t, cycle{name: "gone for a moment", allow: damage, events: []event{
			{name: "scrub-off", do: scrubOff}, {name: "containerd-down", do: containerdDown}, {name: "content-store-away", do: contentAway}, {name: "layer-away", do: layerAway},
		}})
	}},
	{"no-brake", nodeOptions{many: 12}, massDamage},
	{"clock-orders-looks", nodeOptions{blobs: true}, futureState},
}

// TestPlantedDefects: the suite sees each of the mistakes that it is there for,
// and none in the same daemon without it.
func TestPlantedDefects(t *testing.T) {
	for _, d := range plantedDefects {
		for _, planted := range []bool{true, false} {
			t.Run(d.mutant+map[bool]string{true: ",planted", false: ",honest"}[planted], func(t *testing.T) {
				t.Parallel()
				o := d.node
				o.binary = must[string](t)(defects.Clock())
				if planted {
					o.env = []string{defects.Activate(d.mutant)}
				}
				found := d.shows(t, newNode(t, "ext4", o))
				if planted && len(found) == 0 {
					t.Error("the mistake was not seen")
				}
				for _, p := range found {
					if planted {
						t.Log("seen: " + p)
					} else {
						t.Error(p)
					}
				}
			})
		}
	}
}

// shallowLook: what was found by reading content is not overruled by what did not
// read it. containerd is down, so that the image is not dropped meanwhile.
func shallowLook(t testing.TB, n *node) (found problems) {
	check(t, n.Containerd.Kill())
	n.deep = false
	n.configure(t, n.ContentRoot())
	check(t, n.Daemon.Restart(t.Context()))
	harms[0].do(t, n)
	if all, _ := n.results(t, "repair", "--deep", "--apply"); len(all) != 1 || all[0].State != "damaged" {
		t.Fatalf("repair --deep has found %v", all)
	}
	refused := func(when string) {
		sn := must[snapshotter](t)(n.Daemon.Snapshotter())
		defer sn.Close()
		if _, err := sn.Stat(t.Context(), n.names[0]); err == nil {
			found.add("%s, a layer whose content is known to be damaged is not refused", when)
		}
	}
	refused("at once")
	_, _ = n.results(t, "repair", "--apply")
	refused("after repair --apply")
	// Its error is that a layer is damaged.
	_ = n.scrubbed(t)
	refused("after a scrub of metadata")
	check(t, n.Daemon.Restart(t.Context()))
	refused("after a restart")
	return found
}

// massDamage changes one mode in each of many layers, of which no blobs are
// there. The image stays, the daemon reports why, and all is well when the modes
// are as they were.
func massDamage(t testing.TB, n *node) (found problems) {
	chmod := func(mode os.FileMode) {
		for i := len(layerNames); i < len(n.ids); i++ {
			check(t, os.Chmod(n.layer(i, fmt.Sprintf("further%d/file", i-len(layerNames))), mode))
		}
	}
	n.mark = len(must[string](t)(n.Daemon.Log()))
	chmod(0o666)
	n.halt(t)
	n.boot(t)
	_ = n.stat(t)
	braked := false
	for until := time.Now().Add(20 * time.Second); time.Now().Before(until) && len(found) == 0; time.Sleep(500 * time.Millisecond) {
		found.unless(n.imageListed(t))
		if r, err := n.Daemon.Inspect(t.Context()); err == nil && r.Brake != "" {
			braked = true
		}
	}
	if !braked {
		found.add("inspect --json has no brake")
	}
	if len(found) > 0 {
		return found // there may be no layers any more
	}
	chmod(0o644)
	n.recovers(t, &found)
	found.unless(n.ready(t, time.Minute))
	return found
}

// futureState: the journal has what a daemon with a clock that was far ahead has
// found. A layer that is damaged later is healed all the same.
func futureState(t testing.TB, n *node) (found problems) {
	offset := time.Until(time.Date(2098, 1, 1, 0, 0, 0, 0, time.UTC))
	n.setEnv(t, fmt.Sprintf("CLOCK_OFFSET=%d", int(offset.Seconds())))
	n.rebooted(t)
	check(t, n.ready(t, time.Minute))
	_ = n.stat(t)
	n.setEnv(t)
	check(t, n.Daemon.Restart(t.Context()))
	harms[1].do(t, n)
	_, err := n.results(t, "repair", "--apply")
	found.unless(err)
	if _, err := os.Lstat(n.layer(2, "top/acl")); err != nil {
		found.add("a file that was removed was not healed: %v", err)
	}
	found.unless(n.stat(t))
	return found
}
