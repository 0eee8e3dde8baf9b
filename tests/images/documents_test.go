package images

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// config is the digest of an image's config.
func (n *node) config(t *testing.T, img kit.Pushed) digest.Digest {
	t.Helper()
	var m ocispec.Manifest
	check(t, json.Unmarshal(must[[]byte](t)(os.ReadFile(n.Blob(img.Manifest))), &m))
	return m.Config.Digest
}

// TestDocuments: an image whose manifest or config is not usable does not start after a restart
// of containerd, whatever its layers are. repair drops the bad documents and the names and
// keeps the rest, so that the next pull fetches nothing but the documents. Images that are not
// unpacked, or in another snapshotter only, are left alone.
func TestDocuments(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	bad := map[string]kit.Pushed{}
	for name, spoil := range map[string]func(kit.Pushed){
		"config-corrupt":   func(img kit.Pushed) { rewrite(t, n.Blob(n.config(t, img))) },
		"config-missing":   func(img kit.Pushed) { check(t, os.Remove(n.Blob(n.config(t, img)))) },
		"manifest-corrupt": func(img kit.Pushed) { rewrite(t, n.Blob(img.Manifest)) },
		"manifest-short":   func(img kit.Pushed) { check(t, os.Truncate(n.Blob(img.Manifest), 10)) },
	} {
		bad[name] = n.pull(t, name)
		spoil(bad[name])
	}
	fetched, foreign, healthy := n.push(t, "fetched"), n.push(t, "foreign"), n.pull(t, "healthy")
	must[string](t)(n.Ctr(t.Context(), "content", "fetch", "--plain-http", fetched.Ref))
	must[string](t)(n.Ctr(t.Context(), "image", "pull", "--plain-http", "--snapshotter", "overlayfs", foreign.Ref))
	imported := n.push(t, "imported")
	must[string](t)(n.Ctr(t.Context(), "content", "fetch", "--plain-http", imported.Ref))
	check(t, os.Truncate(n.Blob(imported.Layers[1].Digest), 10))
	bad["imported, and a layer short"] = imported

	found, status := n.images(t, "check")
	if status != 1 {
		t.Errorf("status %d, want 1", status)
	}
	for name, img := range bad {
		if r := found.of(t, img); r.Verdict != "needs fetch" || r.Fetch == nil || r.Fetch.Bytes == 0 {
			t.Errorf("%s: %s (%s), %+v", name, r.Verdict, r.Reason, r.Fetch)
		}
	}
	for img, want := range map[*kit.Pushed]string{&fetched: "not unpacked", &foreign: "not ours", &healthy: "ready"} {
		if r := found.of(t, *img); r.Verdict != want {
			t.Errorf("%s: %s (%s), want %s", img.Ref, r.Verdict, r.Reason, want)
		}
	}

	inodes := map[string]uint64{}
	for name, img := range bad {
		inodes[name] = inode(t, n.Blob(img.Layers[0].Digest))
	}
	repaired, status := n.images(t, "repair", "--apply")
	if status != 0 || len(repaired) != len(bad) {
		t.Errorf("repair: status %d, %d images", status, len(repaired))
	}
	p := must[*kit.Pod](t)(n.CRI.StartPod(t.Context()))
	defer func() { check(t, p.Remove(t.Context())) }()
	for name, img := range bad {
		r := repaired.of(t, img)
		if !slices.Equal(r.actions(), []string{"drop names"}) || !r.Dropped {
			t.Errorf("%s: plan %q, dropped %v (%s), blocked: %s", name, r.actions(), r.Dropped, r.Done, r.Blocked)
		}
		check(t, n.CRI.WaitKnown(t.Context(), img.Ref, false))
		check(t, n.CRI.Pull(t.Context(), img.Ref))
		n.runs(t, p, img)
		if now := inode(t, n.Blob(img.Layers[0].Digest)); now != inodes[name] {
			t.Errorf("%s: a good layer blob was fetched again", name)
		}
	}
	kittest.WaitFor(t, time.Minute, func() error {
		if left := must[string](t)(n.Ctr(t.Context(), "leases", "ls", "-q")); strings.Contains(left, "durable-snapshotter-repair-") {
			return fmt.Errorf("leases of images that are back: %s", left)
		}
		return nil
	})
	n.runs(t, p, fetched)
	n.runs(t, p, healthy)
	if found, status := n.images(t, "check"); status != 0 || found.of(t, healthy).Verdict != "ready" {
		t.Errorf("at the end: status %d", status)
	}
}

func inode(t *testing.T, file string) uint64 {
	t.Helper()
	return must[os.FileInfo](t)(os.Stat(file)).Sys().(*syscall.Stat_t).Ino
}

// TestLostShared: layers that only containerd has on record, shared by two images, are unpacked
// again for both, also when the repair was cut short after it had removed the keys. A third
// image on the same base stays as it is.
func TestLostShared(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	shared := kit.NewLayer(kit.Gzip, kit.Dir("shared", 0o755), kit.File("shared/file", 0o644, "shared\n"))
	push := func(name string) kit.Pushed {
		own := kit.NewLayer(kit.Gzip, kit.Dir("own", 0o755), kit.Dir("proc", 0o555), kit.Dir("sys", 0o555), kit.Dir("dev", 0o755), kit.File("own/name", 0o644, name+"\n"))
		img := must[kit.Pushed](t)(n.Push(t.Context(), name, kit.Image{Cmd: []string{"/bin/guest"}, Layers: []kit.Layer{n.base, shared, own}}))
		check(t, n.CRI.Pull(t.Context(), img.Ref))
		return img
	}
	a, b, other := push("a"), push("b"), n.pull(t, "other")
	before := n.row(t, other, 0)
	lose := func() {
		n.lose(t, a, 2)
		n.lose(t, b, 2)
		n.lose(t, a, 1)
	}
	p := must[*kit.Pod](t)(n.CRI.StartPod(t.Context()))
	defer func() { check(t, p.Remove(t.Context())) }()
	for _, cut := range []bool{false, true} {
		lose()
		found, status := n.images(t, "check")
		if status != 1 {
			t.Errorf("status %d", status)
		}
		for _, img := range []kit.Pushed{a, b} {
			if r := found.of(t, img); r.Verdict != "healable" {
				t.Errorf("%s: %s (%s)", img.Ref, r.Verdict, r.Reason)
			}
		}
		if cut {
			for _, key := range []string{a.Top(), b.Top(), a.ChainIDs[1].String()} {
				// containerd's collection may be quicker: nothing keeps the lower one any more.
				if _, err := n.Ctr(t.Context(), "snapshots", "--snapshotter", "durable", "rm", key); err != nil && !strings.Contains(err.Error(), "does not exist") {
					t.Fatal(err)
				}
			}
		}
		if repaired, status := n.images(t, "repair", "--apply"); status != 0 {
			t.Fatalf("repair: status %d: %+v", status, repaired)
		}
		for _, img := range []kit.Pushed{a, b} {
			n.runs(t, p, img)
		}
		if found, status := n.images(t, "check", "--deep"); status != 0 || found.of(t, a).Verdict != "ready" || found.of(t, b).Verdict != "ready" {
			t.Errorf("cut=%v, after the repair: status %d: %+v", cut, status, found)
		}
	}
	if now := n.row(t, other, 0); now.ID != before.ID {
		t.Errorf("the base is snapshot %d, was %d", now.ID, before.ID)
	}
	if left := must[string](t)(n.Ctr(t.Context(), "leases", "ls", "-q")); strings.Contains(left, "durable-snapshotter") {
		t.Errorf("leases are left: %s", left)
	}
}

// TestPause: the image of all sandboxes. Without its blob it is broken as long as a pod runs.
func TestPause(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	p := must[*kit.Pod](t)(n.CRI.StartPod(t.Context()))
	t.Cleanup(func() { _ = p.Remove(context.Background()) })
	spoil := func() { check(t, os.Remove(n.file(t, n.pause, 0, "only/in/pause"))) }
	spoil()
	if found, _ := n.images(t, "check"); found.of(t, n.pause).Verdict != "healable" {
		t.Errorf("%+v", found)
	}
	if repaired, status := n.images(t, "repair", "--apply"); status != 0 || repaired.of(t, n.pause).Verdict != "ready" {
		t.Errorf("status %d: %+v", status, repaired)
	}
	spoil()
	check(t, os.Remove(n.Blob(n.pause.Layers[0].Digest)))
	found, _ := n.images(t, "check")
	if r := found.of(t, n.pause); r.Verdict != "in use and broken" || len(r.Holders) != 1 || !strings.Contains(r.Holders[0].Text, "sandbox "+p.ID) {
		t.Errorf("%+v", r)
	}
	check(t, p.Remove(t.Context()))
	if repaired, status := n.images(t, "repair", "--apply", n.pause.Ref); status != 0 || !repaired.of(t, n.pause).Dropped {
		t.Errorf("status %d: %+v", status, repaired)
	}
	// The CRI plugin pulls it by itself.
	again := must[*kit.Pod](t)(n.CRI.StartPod(t.Context()))
	check(t, again.Remove(t.Context()))
	if found, status := n.images(t, "check", "--deep"); status != 0 || found.of(t, n.pause).Verdict != "ready" {
		t.Errorf("status %d: %+v", status, found)
	}
}

// TestNoAnswer: without containerd, or without the daemon, nothing is called bad. What an
// operator names and does not exist is a usage error.
func TestNoAnswer(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	img := n.pull(t, "app")
	table, stderr, status := kittest.Verb(t, n.Daemon, "check", "--images")
	if lines := strings.Split(table, "\n"); status != 0 || len(lines) != 4 || !strings.HasPrefix(lines[0], "IMAGE ") || !strings.HasPrefix(lines[1], img.Ref+" ") {
		t.Errorf("status %d:\n%s%s", status, table, stderr)
	}
	for _, args := range [][]string{{"no/such:image"}, {"--namespace", "nowhere"}, {"--cached"}} {
		if _, stderr, status := kittest.Verb(t, n.Daemon, append([]string{"check", "--images"}, args...)...); status != 2 {
			t.Errorf("check --images %q: status %d: %s", args, status, stderr)
		}
	}
	for _, args := range [][]string{{img.Ref}, {img.Manifest.String()}, {"--namespace", kit.CRINamespace, img.Ref}} {
		if found, status := n.images(t, "check", args...); status != 0 || len(found) != 1 {
			t.Errorf("check --images %q: status %d: %+v", args, status, found)
		}
	}
	if _, stderr, status := kittest.Verb(t, n.Daemon, "check", "--force"); status != 2 {
		t.Errorf("status %d: %s", status, stderr)
	}

	check(t, n.Daemon.Stop())
	if found, status := n.images(t, "check"); status != 3 || found.of(t, img).Verdict != "cannot say" {
		t.Errorf("without the daemon: status %d: %+v", status, found)
	}
	check(t, n.Daemon.Start(t.Context()))
	check(t, n.Containerd.Stop())
	for _, verb := range []string{"check", "repair"} {
		if stdout, stderr, status := kittest.Verb(t, n.Daemon, verb, "--images"); status != 3 || stdout != "" || !strings.Contains(stderr, n.Socket()) {
			t.Errorf("%s without containerd: status %d: %s%s", verb, status, stdout, stderr)
		}
	}
	check(t, n.StartContainerd(t.Context()))
	if _, status := n.images(t, "check"); status != 0 {
		t.Errorf("with containerd again: status %d", status)
	}
}
