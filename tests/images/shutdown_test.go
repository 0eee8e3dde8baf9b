package images

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// checked is what a daemon has logged of its check after an unclean shutdown.
type checked struct {
	order    []string          // of the images, as they were logged
	verdicts map[string]string // the last of each
	ended    bool
}

// shutdownLog reads the daemon's log from a place on.
func (n *node) shutdownLog(t *testing.T, from int) checked {
	t.Helper()
	c := checked{verdicts: map[string]string{}}
	for line := range strings.Lines(must[string](t)(n.Daemon.Log())[from:]) {
		var l struct{ Event, Image, Verdict string }
		if json.Unmarshal([]byte(line), &l) != nil {
			continue
		}
		switch l.Event {
		case "image_checked":
			c.order, c.verdicts[l.Image] = append(c.order, l.Image), l.Verdict
		case "images_checked":
			c.ended = true
		}
	}
	return c
}

// configured is the configuration of the daemon after a shutdown.
func (n *node) configured(repair string) string {
	return fmt.Sprintf("[containerd]\naddress = '%s'\ndrop_images = true\n[heal]\nregistry = true\nhosts = ''\n[images]\nrepair = '%s'\n", n.Socket(), repair)
}

// TestAfterShutdown: after an unclean shutdown every image is checked, the pinned ones first,
// and repaired as far as the configuration allows. An interrupted check is done by the next
// daemon, and after that none is due any more.
func TestAfterShutdown(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	all := map[string]kit.Pushed{}
	for _, name := range []string{"healthy", "damaged", "spoiled", "lost"} {
		all[name] = n.pull(t, name)
	}
	n.lose(t, all["lost"], 1)
	healthy := n.trees(t, all["healthy"])
	file := n.file(t, all["damaged"], 1, "own/spare")
	blob := n.Blob(all["spoiled"].Layers[1].Digest)

	for _, c := range []struct {
		repair, spoiled, lost string
	}{
		{"off", "ready, content incomplete", "healable"},
		{"heal", "ready, content incomplete", "healable"},
		{"fetch", "ready", "healable"},
		{"full", "ready", "ready"},
	} {
		from := n.cut(t, c.repair, func() {
			check(t, os.Remove(file))
			check(t, os.Truncate(blob, 20))
		})
		check(t, n.StartContainerd(t.Context()))
		if c.repair != "off" {
			kittest.WaitFor(t, 2*time.Minute, func() error {
				if !n.shutdownLog(t, from).ended {
					return fmt.Errorf("repair = %s: the check has not ended", c.repair)
				}
				return nil
			})
		}
		// The daemon heals layers whatever repair is.
		kittest.WaitFor(t, 2*time.Minute, func() error { _, err := os.Stat(file); return err })
		want := map[string]string{"healthy": "ready", "damaged": "ready", "spoiled": c.spoiled, "lost": c.lost, "pause": "ready"}
		got := n.shutdownLog(t, from)
		if c.repair == "off" {
			if len(got.order) > 0 {
				t.Errorf("repair = off: checked %v", got.verdicts)
			}
		} else if v := n.named(got.verdicts); !maps.Equal(v, want) {
			t.Errorf("repair = %s: verdicts %v, want %v", c.repair, v, want)
		} else if !strings.Contains(got.order[0], "pause") {
			t.Errorf("repair = %s: the pause image was not first: %v", c.repair, got.order)
		}
		found, _ := n.images(t, "check")
		v := map[string]string{}
		for _, r := range found {
			v[r.Image] = r.Verdict
		}
		if v = n.named(v); !maps.Equal(v, want) {
			t.Errorf("repair = %s: check --images: %v, want %v", c.repair, v, want)
		}
	}
	for i, tree := range n.trees(t, all["healthy"]) {
		if d := kit.Diff(healthy[i], tree, 5); d != "" {
			t.Errorf("layer %d of the image that nothing has happened to:\n%s", i, d)
		}
	}

	// Without containerd the check cannot begin; the daemon that ends has not done it.
	from := n.cut(t, "fetch", func() { check(t, os.Truncate(blob, 20)) })
	check(t, n.Daemon.Restart(t.Context()))
	check(t, n.Daemon.Kill())
	check(t, n.Daemon.Start(t.Context()))
	if c := n.shutdownLog(t, from); c.ended {
		t.Error("the check has ended without containerd")
	}
	check(t, n.StartContainerd(t.Context()))
	kittest.WaitFor(t, 2*time.Minute, func() error {
		if c := n.shutdownLog(t, from); !c.ended || c.verdicts[all["spoiled"].Ref] != "ready" {
			return fmt.Errorf("after restarts of the daemon: %v", c)
		}
		return nil
	})
	kittest.WaitFor(t, time.Minute, func() error {
		if r := kittest.Inspect(t, n.Daemon).Journal.Run; r.ImagesEpoch != r.Epoch {
			return fmt.Errorf("a check is due still: %+v", r)
		}
		return nil
	})
	from = len(must[string](t)(n.Daemon.Log()))
	check(t, n.Daemon.Restart(t.Context()))
	check(t, n.stat(t, all["healthy"]))
	if c := n.shutdownLog(t, from); len(c.order) > 0 {
		t.Errorf("checked again after a clean stop: %v", c)
	}
}

// TestAbsentStoreAfterShutdown: the content store is not mounted when the machine comes up. The
// rows of its blobs stay, whatever repair allows.
func TestAbsentStoreAfterShutdown(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	img := n.pull(t, "app")
	check(t, n.GoOffline())
	store := filepath.Join(n.ContentRoot(), "blobs")
	from := n.cut(t, "full", func() { check(t, os.Rename(store, store+".away")) })
	check(t, n.StartContainerd(t.Context()))
	kittest.WaitFor(t, 2*time.Minute, func() error {
		if c := n.shutdownLog(t, from); c.verdicts[img.Ref] == "" {
			return fmt.Errorf("not checked: %v", c)
		}
		return nil
	})
	check(t, n.Kill())
	check(t, os.RemoveAll(store))
	check(t, os.Rename(store+".away", store))
	check(t, n.Start(t.Context()))
	found, status := n.images(t, "check", "--deep")
	if r := found.of(t, img); status != 0 || r.Verdict != "ready" {
		t.Errorf("when the store is mounted: status %d: %+v", status, r)
	}
}

// cut stops the node as a power cut does, calls do, and starts the daemon at the next boot. It
// returns how long its log was.
func (n *node) cut(t *testing.T, repair string, do func()) (logged int) {
	t.Helper()
	check(t, n.Kill())
	do()
	check(t, n.Daemon.Configure(n.configured(repair)))
	check(t, kit.NewBoot())
	logged = len(must[string](t)(n.Daemon.Log()))
	check(t, n.Daemon.Start(t.Context()))
	return logged
}

// named replaces the references of images by the names that the tests gave them.
func (n *node) named(verdicts map[string]string) map[string]string {
	named := map[string]string{}
	for ref, v := range verdicts {
		_, name, _ := strings.Cut(ref, "/")
		name, _, _ = strings.Cut(name, ":")
		named[name] = v
	}
	return named
}

// stat calls Stat of containerd for the layers of an image.
func (n *node) stat(t *testing.T, img kit.Pushed) error {
	t.Helper()
	ctx, cl, err := n.Client(t.Context())
	if err != nil {
		return err
	}
	defer cl.Close()
	_, err = cl.SnapshotService("durable").Stat(ctx, img.ChainIDs[len(img.ChainIDs)-1].String())
	return err
}
