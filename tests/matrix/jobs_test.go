package matrix

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// pulls pulls by the release's own ctr, and by its CRI plugin.
func pulls(t testing.TB, n *node) {
	byCtr := n.push(t, "by-ctr")
	kittest.Pull(t, n.Node, "durable", byCtr.Ref)
	n.whole(t, byCtr, n.pull(t, "by-cri"))
}

// runs runs containers, and kills the daemon under one of them.
func runs(t testing.TB, n *node) {
	img := n.pull(t, "run")
	n.run(t, "--detach", img, "lasting", "/bin/guest", "wait")
	n.exec(t, "lasting", "write", "/etc/before", "before")
	check(t, n.Daemon.Kill())
	n.exec(t, "lasting", "write", "/etc/between", "between")
	check(t, n.Daemon.Start(t.Context()))
	for _, word := range []string{"before", "between"} {
		if got := n.exec(t, "lasting", "cat", "/etc/"+word); got != word {
			t.Errorf("a file that was written %s the daemon was dead has %q", word, got)
		}
	}
	// containerd waits up to 3 s before it connects again to a proxy plugin that was gone.
	kittest.WaitFor(t, limit, func() error {
		_, err := n.Ctr(t.Context(), "snapshots", "--snapshotter", "durable", "ls")
		return err
	})
	n.whole(t, img)
	n.remove(t, "lasting")
}

// survives cuts the power after pulls, with a container running. The last pull is one into
// the built-in snapshotter, which shows that the cut has taken what was not synced.
func survives(t testing.TB, n *node) {
	byCtr, byCRI := n.push(t, "cut-ctr"), n.push(t, "cut-cri")
	kittest.Pull(t, n.Node, "durable", byCtr.Ref)
	n.run(t, "--detach", byCtr, "cut", "/bin/guest", "wait")
	n.exec(t, "cut", "write", "/etc/note", "synced")
	check(t, n.CRI.Pull(t.Context(), byCRI.Ref))
	builtIn := n.push(t, "cut-built-in")
	kittest.Pull(t, n.Node, "overlayfs", builtIn.Ref)
	// Which is not that of its tars with each release: with parallel unpacking, attributes are lost.
	before, _, err := n.view(t, "overlayfs", builtIn)
	check(t, err)

	check(t, errors.Join(n.PowerCut(), n.Start(t.Context())))
	if after, _, err := n.view(t, "overlayfs", builtIn); err == nil && kit.Diff(before, after, 1) == "" {
		t.Error("the built-in snapshotter has lost nothing: the cut has taken nothing")
	}
	for _, img := range []image{byCtr, byCRI} {
		if known := must[bool](t)(n.CRI.Known(t.Context(), img.Ref)); !known {
			t.Errorf("the CRI plugin does not know %s after its start", img.Ref)
		}
	}
	n.whole(t, byCtr, byCRI)
	n.undamaged(t)
	kittest.Ctr(t, n.Node, "task", "start", "--detach", "cut")
	if got := n.exec(t, "cut", "cat", "/etc/note"); got != "synced" {
		t.Errorf("what the container has synced is %q", got)
	}
	n.remove(t, "cut")
	kittest.Ctr(t, n.Node, "image", "rm", "--sync", builtIn.Ref)
}

// heals damages a layer while the node is down. It heals offline, out of its blob.
func heals(t testing.TB, n *node) {
	img := n.pull(t, "heal")
	check(t, n.PowerCut())
	n.damage(t, img)
	check(t, n.Start(t.Context()))
	if known := must[bool](t)(n.CRI.Known(t.Context(), img.Ref)); !known {
		t.Errorf("the CRI plugin does not know %s after its start", img.Ref)
	}
	n.event(t, "layer_healed")
	n.whole(t, img)
}

// fetchesTLS is fetches of an image whose name leads to a registry with TLS, as those of
// most images do.
func fetchesTLS(t testing.TB, n *node) {
	img := n.pull(t, "fetch-tls")
	ref := n.tls + strings.TrimPrefix(img.Ref, n.Registry.Host)
	kittest.Ctr(t, n.Node, "image", "tag", img.Ref, ref)
	kittest.Ctr(t, n.Node, "image", "rm", "--sync", img.Ref)
	img.Ref = ref
	n.fetch(t, img)
}

// fetchesHTTP is fetches of an image from a registry without TLS.
func fetchesHTTP(t testing.TB, n *node) { n.fetch(t, n.pull(t, "fetch-http")) }

// fetch damages a layer, and removes its blob: the daemon has containerd fetch it.
func (n *node) fetch(t testing.TB, img image) {
	t.Helper()
	check(t, n.CRI.WaitKnown(t.Context(), img.Ref, true))
	check(t, os.Remove(n.blob(img)))
	n.damage(t, img)
	_, _, err := n.Daemon.Verdicts(t.Context(), "repair", "--apply")
	check(t, err)
	if event, line := n.event(t, "blob_fetched", "fetch_failed"); event == "fetch_failed" {
		// What follows is a clean pull.
		n.event(t, "layer_dropped")
		check(t, n.CRI.WaitKnown(t.Context(), img.Ref, false))
		img.Ref = n.Registry.Ref(img.name)
		check(t, n.CRI.Pull(t.Context(), img.Ref))
		n.whole(t, img)
		t.Fatal(line)
	}
	n.event(t, "layer_healed")
	if _, err := os.Stat(n.blob(img)); err != nil {
		t.Errorf("the blob was fetched: %v", err)
	}
	n.whole(t, img)
}

// repairs has repair --images --apply mend three images: one that heals in place, one
// whose blob is bad, and one whose top layer the daemon has lost. An image that is dropped must be
// unknown to the CRI plugin without a restart, and its pull must be clean.
func repairs(t testing.TB, n *node) {
	damaged, bad, lost := n.pull(t, "damaged"), n.pull(t, "bad-blob"), n.pull(t, "lost")
	n.damage(t, damaged)
	n.damage(t, bad)
	// containerd takes a short blob for good.
	check(t, os.Truncate(n.blob(bad), 20))
	sn := kittest.Connect(t, n.Daemon)
	check(t, sn.Remove(t.Context(), n.top(t, lost).Name))
	check(t, sn.(snapshots.Cleaner).Cleanup(t.Context()))

	if stdout, _, status := kittest.Verb(t, n.Daemon, "check", "--images"); status != 1 {
		t.Errorf("check --images: status %d, want 1:\n%s", status, stdout)
	}
	kittest.WaitFor(t, limit, func() error { // the daemon may be at work on the same layers
		stdout, stderr, status := kittest.Verb(t, n.Daemon, "repair", "--images", "--deep", "--apply")
		if status != 0 {
			return fmt.Errorf("repair --images --apply: status %d: %s%s", status, stdout, stderr)
		}
		return nil
	})
	n.event(t, "layer_healed")
	listed := kittest.Ctr(t, n.Node, "images", "ls", "--quiet")
	for _, img := range []image{damaged, bad, lost} {
		there := slices.Contains(strings.Fields(listed), img.Ref)
		check(t, n.CRI.WaitKnown(t.Context(), img.Ref, there))
		if !there && img.name != bad.name {
			t.Errorf("image %s was dropped, and its blobs are good", img.name)
		}
		if !there {
			check(t, n.CRI.Pull(t.Context(), img.Ref))
		}
	}
	n.whole(t, damaged, bad, lost)
}

// cri is what the kubelet does: pods, images that were imported and are unpacked when a
// container is created, and all of it again after a power cut.
func cri(t testing.TB, n *node) {
	pulled, imported := n.pull(t, "pod"), n.push(t, "imported")
	kittest.Ctr(t, n.Node, "content", "fetch", "--plain-http", imported.Ref)
	check(t, n.CRI.WaitKnown(t.Context(), imported.Ref, true))
	p := must[*kit.Pod](t)(n.CRI.StartPod(t.Context()))
	for _, img := range []image{pulled, imported} {
		check(t, p.Start(t.Context(), must[string](t)(p.Create(t.Context(), img.Ref, "/bin/guest", "wait"))))
	}
	before := n.list(t)
	check(t, errors.Join(n.PowerCut(), n.Start(t.Context())))
	if after := n.list(t); !slices.Equal(before, after) {
		t.Errorf("the CRI plugin has listed %q and lists %q after the power cut", before, after)
	}
	check(t, p.Remove(t.Context()))
	p = must[*kit.Pod](t)(n.CRI.StartPod(t.Context()))
	for _, img := range []image{pulled, imported} {
		id := must[string](t)(p.Create(t.Context(), img.Ref, "/bin/guest", "cat", "/etc/name"))
		check(t, p.Start(t.Context(), id))
		if code := must[int32](t)(p.Wait(t.Context(), id)); code != 0 {
			t.Errorf("a container of image %s has ended with %d", img.name, code)
		}
	}
	check(t, p.Remove(t.Context()))
	n.whole(t, pulled, imported)
	n.undamaged(t)
}

// list are the images that the CRI plugin lists, with their names.
func (n *node) list(t testing.TB) (names []string) {
	t.Helper()
	r := must[*runtimeapi.ListImagesResponse](t)(n.CRI.Images.ListImages(t.Context(), &runtimeapi.ListImagesRequest{}))
	for _, i := range r.Images {
		names = append(names, i.RepoTags...)
	}
	slices.Sort(names)
	return names
}

// figures are those by which the kubelet decides when to remove images.
func figures(t testing.TB, n *node) {
	r := must[*runtimeapi.ImageFsInfoResponse](t)(n.CRI.Images.ImageFsInfo(t.Context(), &runtimeapi.ImageFsInfoRequest{}))
	if len(r.ImageFilesystems) != 1 {
		t.Fatalf("%d file systems of images", len(r.ImageFilesystems))
	}
	fs := r.ImageFilesystems[0]
	if fs.UsedBytes.GetValue() == 0 || fs.InodesUsed.GetValue() == 0 {
		t.Errorf("the figures of the images are %+v", fs)
	}
	if got := fs.FsId.GetMountpoint(); got != n.Daemon.Root {
		t.Errorf("the figures are of %s, and the images in %s", got, n.Daemon.Root)
	}
}
