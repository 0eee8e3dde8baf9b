package overlay

import (
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

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
	p := newPuller(t, 1, true, fmt.Sprintf(`
[plugins.'io.containerd.cri.v1.images']
  snapshotter = 'durable'
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = %q
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true # for machines that give root no CAP_SYS_RESOURCE
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    conf_dir = %q
[plugins.'io.containerd.nri.v1.nri']
  disable = true
`, pause.Ref, scratch(t)))

	conn := must[*grpc.ClientConn](t)(grpc.NewClient("unix://"+p.cd.Address, grpc.WithTransportCredentials(insecure.NewCredentials())))
	defer conn.Close()
	runtime, images := runtimeapi.NewRuntimeServiceClient(conn), runtimeapi.NewImageServiceClient(conn)

	// On the host's network, because a pod network needs plugins that are no
	// part of containerd.
	host := &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE}
	sandboxConfig := &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: "pod", Uid: "uid", Namespace: "default", Attempt: 1},
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent:    "/" + p.cd.Namespace,
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: host},
		},
	}
	_, err := images.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: pause.Ref}})
	check(t, err)
	sandbox, err := runtime.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: sandboxConfig})
	check(t, err)
	defer func() {
		_, err := runtime.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: sandbox.PodSandboxId})
		check(t, err)
		_, err = runtime.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: sandbox.PodSandboxId})
		check(t, err)
	}()

	// Pulled for the built-in snapshotter: the blobs are there, and nothing that
	// the CRI's snapshotter could use.
	img := p.push(t, eightLayers)
	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
	_, err = p.cd.Ctr(t.Context(), "--namespace", "k8s.io", "image", "pull", "--plain-http", "--snapshotter", overlayfs, img.Ref)
	check(t, err)
	known := func() bool {
		r, err := images.ImageStatus(t.Context(), &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: img.Ref}})
		check(t, err)
		return r.Image != nil
	}
	for deadline := time.Now().Add(30 * time.Second); !known(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the CRI plugin does not get to know the image")
		}
	}
	before := p.unpacked(t, true)
	c, err := runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{
		PodSandboxId:  sandbox.PodSandboxId,
		SandboxConfig: sandboxConfig,
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "container"},
			Image:    &runtimeapi.ImageSpec{Image: img.Ref},
			Command:  []string{"/bin/tool"},
			Linux:    &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{NamespaceOptions: host}},
		},
	})
	check(t, err)
	if n := p.unpacked(t, true); n != before+1 {
		t.Errorf("containerd's log tells of %d parallel unpackings, want one", n-before)
	}
	cl := must[*client.Client](t)(client.New(p.cd.Address))
	defer cl.Close()
	mounts := must[[]mount.Mount](t)(cl.SnapshotService(durable).Mounts(ctx, c.ContainerId))
	dir := must[string](t)(os.MkdirTemp(scratch(t), "root"))
	check(t, mount.All(mounts, dir))
	got, err := look(dir)
	check(t, mount.UnmountAll(dir, 0))
	check(t, err)
	if text := reference(eightLayers).view().diff(got, eightLayers); text != "" {
		t.Errorf("the container's root:\n%s", text)
	}
}
