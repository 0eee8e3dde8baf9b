package noharm

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// harm is one class of what does harm a layer.
type harm struct {
	name  string
	layer int
	do    func(t testing.TB, n *node) // to that layer
}

// harms are the control of the events: all of them must be noticed.
var harms = []harm{
	{"byte-flipped", 0, func(t testing.TB, n *node) {
		f := must[*os.File](t)(os.OpenFile(n.layer(0, "base/big"), os.O_RDWR, 0))
		info := must[os.FileInfo](t)(f.Stat())
		_, err := f.WriteAt([]byte("X"), 5000)
		check(t, errors.Join(err, f.Close(), os.Chtimes(f.Name(), info.ModTime(), info.ModTime())))
	}},
	{"file-removed", 2, func(t testing.TB, n *node) { check(t, os.Remove(n.layer(2, "top/acl"))) }},
	{"mode-changed", 1, func(t testing.TB, n *node) { check(t, os.Chmod(n.layer(1, "middle/owned"), 0o666)) }},
}

// trees are the fingerprints of the layers.
func (n *node) trees(t testing.TB) (all []kit.Tree) {
	t.Helper()
	for _, id := range n.ids {
		all = append(all, must[kit.Tree](t)(kit.FingerprintLayer(n.tree(id), n.image)))
	}
	return all
}

// TestHarm: a node that is harmed in the place of a harmless event does not pass
// for unharmed. The layer is found damaged, and healed in place.
func TestHarm(t *testing.T) {
	t.Parallel()
	n := newNode(t, "ext4", nodeOptions{blobs: true})
	whole := n.trees(t)
	for _, h := range harms {
		t.Run(h.name, func(t *testing.T) {
			found := n.live(t, cycle{name: h.name, events: []event{{name: h.name, do: func(t testing.TB, n *node) func() {
				h.do(t, n)
				return nil
			}}}})
			for _, want := range []string{
				fmt.Sprintf("check --deep: layer %d is damaged", n.ids[h.layer]),
				"directories of layers were replaced",
				"extracted again from its blob",
			} {
				if !slices.ContainsFunc(found, func(p string) bool { return strings.Contains(p, want) }) &&
					// The scrub may have been first.
					!strings.HasPrefix(want, "check") {
					t.Errorf("after harm, no problem reads %q: %q", want, found)
				}
			}
			check(t, n.ready(t, time.Minute))
			for i, tree := range n.trees(t) {
				if d := kit.Diff(whole[i], tree, 5); d != "" {
					t.Errorf("layer %s was not healed:\n%s", layerNames[i], d)
				}
			}
			// What mounts of the replaced tree show is another matter.
			n.unuse(t)
			n.learn(t)
		})
	}
}

// TestHarmWithoutBlobs: without its blob a layer that is harmed is refused, and
// its image is dropped, so that the next pull is clean.
func TestHarmWithoutBlobs(t *testing.T) {
	t.Parallel()
	n := newNode(t, "xfs", nodeOptions{online: true})
	for _, h := range harms {
		t.Run(h.name, func(t *testing.T) {
			h.do(t, n)
			if _, err := n.results(t, "repair", "--deep", "--apply"); err == nil {
				t.Error("repair reports success, and there is nothing to repair the layer from")
			}
			if err := n.stat(t); err == nil {
				t.Error("a layer that is damaged was not refused")
			}
			waitFor(t, time.Minute, func() error {
				if err := n.imageListed(t); err == nil {
					return errors.New("the image was not dropped")
				}
				return nil
			})
			waitFor(t, time.Minute, func() error { return n.CRI.Pull(t.Context(), n.image.Ref) })
			n.learn(t)
			n.waitDiscarded(t)
			n.waitDigested(t)
			check(t, n.stat(t))
		})
	}
}

// TestImageWithGoodBlobsStays: a layer is damaged, and something keeps the daemon
// from healing it, but not a bad blob. The image stays, and is healed afterwards.
func TestImageWithGoodBlobsStays(t *testing.T) {
	t.Parallel()
	n := newNode(t, "ext4", nodeOptions{blobs: true})
	whole := n.trees(t)
	for _, c := range []struct {
		name string
		do   func(t testing.TB, n *node) (undo func())
	}{
		{"content-root-of-another-store", foreignStore},
		{"decompressor-killed", decompressorKilled},
		{"content-store-away", contentAway},
	} {
		t.Run(c.name, func(t *testing.T) {
			var found problems
			n.mark = len(must[string](t)(n.Daemon.Log()))
			undo := c.do(t, n)
			check(t, os.Remove(n.layer(2, "top/acl")))
			_, _ = n.results(t, "repair", "--apply")
			_ = n.stat(t)
			// It tries again after one second, two seconds, and so on.
			for until := time.Now().Add(8 * time.Second); time.Now().Before(until); time.Sleep(500 * time.Millisecond) {
				found.unless(n.imageListed(t))
			}
			undo()
			n.recovers(t, &found)
			n.learn(t)
			for i, tree := range n.trees(t) {
				if d := kit.Diff(whole[i], tree, 5); d != "" {
					found.add("layer %s was not healed:\n%s", layerNames[i], d)
				}
			}
			for _, d := range n.content {
				if !slices.Contains(n.blobsOf(t), d) {
					found.add("the blob %s was removed", d)
				}
			}
			for line := range strings.Lines(n.daemonLog(t)) {
				if logsDrop.MatchString(line) {
					found.add("the daemon logs: %s", line)
				}
			}
			for _, p := range found {
				t.Error(p)
			}
		})
		if t.Failed() {
			n.end(t)
			n = newNode(t, "ext4", nodeOptions{blobs: true})
		}
	}
}

// foreignStore has the daemon search for blobs in a content store that is not that
// of its containerd: one that was left behind when containerd was moved.
func foreignStore(t testing.TB, n *node) func() {
	foreign := n.Path("moved", "io.containerd.content.v1.content")
	check(t, os.MkdirAll(filepath.Join(foreign, "blobs", "sha256"), 0o755))
	check(t, os.MkdirAll(filepath.Join(foreign, "ingest"), 0o755))
	n.configure(t, foreign)
	check(t, n.Daemon.Restart(t.Context()))
	return func() {
		n.configure(t, n.ContentRoot())
		check(t, n.Daemon.Restart(t.Context()))
	}
}

var logsDrop = regexp.MustCompile(`dropped \d+ image|image_dropped`)

// imageListed is an error unless containerd has the image.
func (n *node) imageListed(t testing.TB) error {
	t.Helper()
	out, err := n.Ctr(t.Context(), "images", "ls", "-q")
	if err != nil {
		return err
	}
	if !slices.Contains(strings.Split(out, "\n"), n.image.Ref) {
		return fmt.Errorf("ctr images ls does not list %s: %q", n.image.Ref, out)
	}
	return nil
}

// TestTransientEIO: a disk that cannot read some files of two layers, and then
// can again: a cable, a path to a storage network.
func TestTransientEIO(t *testing.T) {
	for _, blobs := range []bool{true, false} {
		t.Run(map[bool]string{true: "blobs", false: "no-blobs"}[blobs], func(t *testing.T) {
			t.Parallel()
			d := must[*disk.Disk](t)(disk.Start(2 << 30))
			dir := scratch(t)
			t.Cleanup(func() {
				if err := d.Close(); err != nil {
					t.Error(err)
				}
			})
			check(t, d.Format(disk.Ext4))
			check(t, d.Mount(disk.Ext4, dir))
			n := newNodeOn(t, volume{fs: "ext4", device: d.Device(), dir: dir}, nodeOptions{blobs: blobs})
			check(t, d.Watch())
			n.waitDigested(t) // what content is compared with while the blobs are away
			eio := event{name: "transient-eio", do: func(t testing.TB, n *node) func() {
				command(t, "sync", "-f", n.dir)
				ranges := slices.Concat(blocks(t, n.layer(0, "base/big")), blocks(t, n.layer(1, "middle/big")))
				_, err := d.Inject(disk.Fault{Op: disk.OpRead, Ranges: ranges, Errno: unix.EIO})
				check(t, err)
				return func() {
					hits := 0
					for _, f := range must[disk.Stats](t)(d.Stats()).Faults {
						hits += f.Hits
					}
					if hits == 0 {
						t.Error("nothing was read where the disk cannot read")
					}
					check(t, d.Heal())
				}
			}}
			c := cycle{name: "transient EIO", allow: damage, events: []event{
				{name: "containerd-down", do: containerdDown}, {name: "content-store-away", blobs: true, do: contentAway}, eio,
			}}
			c.events = slices.DeleteFunc(c.events, func(e event) bool { return !e.possible("ext4", blobs) })
			for _, p := range n.live(t, c) {
				t.Error(p)
			}
		})
	}
}
