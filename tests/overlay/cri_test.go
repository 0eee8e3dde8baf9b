package overlay

import (
	"os"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// TestCRIUnpacksAtCreate: an image that the CRI plugin knows, but that is not
// unpacked for its snapshotter, is unpacked when a container is created, always
// in parallel (internal/cri/opts/container.go).
func TestCRIUnpacksAtCreate(t *testing.T) {
	registry := must[*kit.Registry](t)(kit.StartRegistry(scratch(t)))
	defer registry.Close()
	waiting := must[kit.Image](t)(kit.Runnable(t.Context()))
	waiting.Cmd = []string{"/bin/guest", "wait"}
	pause := must[kit.Pushed](t)(kit.Push(t.Context(), registry, "pause", waiting))
	p := newPuller(t, 1, &kit.CRIOptions{Pause: pause.Ref})
	cri := must[*kit.CRI](t)(kit.DialCRI(p.Containerd))
	defer cri.Close()
	check(t, cri.Pull(t.Context(), pause.Ref))
	pod := must[*kit.Pod](t)(cri.StartPod(t.Context()))
	defer func() { check(t, pod.Remove(t.Context())) }()

	// Pulled for the built-in snapshotter: the blobs are there, and nothing that
	// the CRI's snapshotter could use.
	img := p.push(t, eightLayers)
	ctx := namespaces.WithNamespace(t.Context(), kit.CRINamespace)
	_, err := p.Containerd.Ctr(t.Context(), "--namespace", kit.CRINamespace, "image", "pull", "--plain-http", "--snapshotter", overlayfs, img.Ref)
	check(t, err)
	check(t, cri.WaitKnown(t.Context(), img.Ref, true))
	before := p.unpacked(t, true)
	container := must[string](t)(pod.Create(t.Context(), img.Ref, "/bin/tool"))
	if n := p.unpacked(t, true); n != before+1 {
		t.Errorf("containerd's log has %d parallel unpackings, want one", n-before)
	}
	cl := must[*client.Client](t)(client.New(p.Containerd.Address))
	defer cl.Close()
	mounts := must[[]mount.Mount](t)(cl.SnapshotService(durable).Mounts(ctx, container))
	dir := must[string](t)(os.MkdirTemp(scratch(t), "root"))
	check(t, mount.All(mounts, dir))
	got, err := readView(dir)
	check(t, mount.UnmountAll(dir, 0))
	check(t, err)
	if text := reference(eightLayers).view().diff(got, eightLayers); text != "" {
		t.Errorf("the container's root:\n%s", text)
	}
}
