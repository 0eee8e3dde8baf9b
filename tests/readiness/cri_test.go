package readiness

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// What the kubelet asks of the CRI plugin, one function a question. Each has a
// minute: a call that hangs shall not take the whole run with it.

func within(t testing.TB) (context.Context, context.CancelFunc) {
	return context.WithTimeout(t.Context(), time.Minute)
}

func spec(img kit.Pushed) *runtimeapi.ImageSpec { return &runtimeapi.ImageSpec{Image: img.Ref} }

// pull pulls as the kubelet does.
func (n *node) pull(t testing.TB, img kit.Pushed) error {
	t.Helper()
	ctx, cancel := within(t)
	defer cancel()
	_, err := n.images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: spec(img)})
	return err
}

// known tells whether the CRI knows an image, which the kubelet asks before it
// pulls (IfNotPresent).
func (n *node) known(t testing.TB, img kit.Pushed) bool {
	t.Helper()
	ctx, cancel := within(t)
	defer cancel()
	return must[*runtimeapi.ImageStatusResponse](t)(n.images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: spec(img)})).Image != nil
}

// waitKnown waits until the CRI has heard of what containerd did with an image.
func (n *node) waitKnown(t testing.TB, img kit.Pushed, want bool) {
	t.Helper()
	waitFor(t, 30*time.Second, func() error {
		if known := n.known(t, img); known != want {
			return fmt.Errorf("CRI plugin knows %s: %v", img.Ref, known)
		}
		return nil
	})
}

// present is known, and makes sure that the list of images says the same. The
// two are two calls, so nothing may change meanwhile.
func (n *node) present(t testing.TB, img kit.Pushed) bool {
	t.Helper()
	ctx, cancel := within(t)
	defer cancel()
	known := n.known(t, img)
	list := must[*runtimeapi.ListImagesResponse](t)(n.images.ListImages(ctx, &runtimeapi.ListImagesRequest{}))
	listed := slices.ContainsFunc(list.Images, func(i *runtimeapi.Image) bool { return slices.Contains(i.RepoTags, img.Ref) })
	if known != listed {
		t.Errorf("ImageStatus of %s says %v, ListImages %v", img.Ref, known, list.Images)
	}
	return known
}

// host is the host's network, because a pod network needs plugins that are no
// part of containerd.
var host = &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE}

// pod is a sandbox that runs the pause image.
type pod struct {
	n      *node
	id     string
	config *runtimeapi.PodSandboxConfig
}

// kubeletLabels are some of those that the kubelet gives to all it makes.
func kubeletLabels(pod, container string) map[string]string {
	l := map[string]string{"io.kubernetes.pod.name": pod, "io.kubernetes.pod.namespace": "default"}
	if container != "" {
		l["io.kubernetes.container.name"] = container
	}
	return l
}

// startPod starts a sandbox, which is removed with all its containers after the
// test.
func (n *node) startPod(t testing.TB) (*pod, error) {
	t.Helper()
	n.count++
	name := fmt.Sprintf("pod%d", n.count)
	p := &pod{n: n, config: &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: name, Uid: "uid-of-" + name, Namespace: "default"},
		Labels:   kubeletLabels(name, ""),
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent:    "/" + n.containerd.Namespace,
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: host},
		},
	}}
	ctx, cancel := within(t)
	defer cancel()
	r, err := n.runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: p.config})
	if err != nil {
		return nil, err
	}
	p.id = r.PodSandboxId
	t.Cleanup(func() { p.remove(t) })
	return p, nil
}

// remove removes a sandbox. Doing it twice is no error.
func (p *pod) remove(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute) // the test's own may have ended
	defer cancel()
	if _, err := p.n.runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
		t.Error(err)
	}
	if _, err := p.n.runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
		t.Error(err)
	}
}

// create creates a container that runs the guest with args.
func (p *pod) create(t testing.TB, img kit.Pushed, args ...string) (string, error) {
	t.Helper()
	p.n.count++
	name := fmt.Sprintf("container%d", p.n.count)
	ctx, cancel := within(t)
	defer cancel()
	r, err := p.n.runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId: p.id, SandboxConfig: p.config,
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: name},
			Labels:   kubeletLabels(p.config.Metadata.Name, name),
			Image:    spec(img),
			Command:  append([]string{"/bin/guest"}, args...),
			Linux:    &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{NamespaceOptions: host}},
		},
	})
	if err != nil {
		return "", err
	}
	return r.ContainerId, nil
}

func (p *pod) start(t testing.TB, id string) error {
	t.Helper()
	ctx, cancel := within(t)
	defer cancel()
	_, err := p.n.runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
	return err
}

// removeContainer removes a container, running or not, and its snapshot.
func (p *pod) removeContainer(t testing.TB, id string) {
	t.Helper()
	ctx, cancel := within(t)
	defer cancel()
	_, err := p.n.runtime.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id})
	check(t, err)
}

// run runs a container to its end. It reads a file of the lowest layer that is
// changed by the top one, with the program of the middle one, so it fails unless
// the whole image is there.
func (p *pod) run(t testing.TB, img kit.Pushed) error {
	t.Helper()
	id, err := p.create(t, img, "cat", "/etc/motd")
	if err != nil {
		return err
	}
	defer p.removeContainer(t, id)
	if err := p.start(t, id); err != nil {
		return err
	}
	var status *runtimeapi.ContainerStatus
	waitFor(t, time.Minute, func() error {
		ctx, cancel := within(t)
		defer cancel()
		r, err := p.n.runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
		if err != nil {
			return err
		}
		if status = r.Status; status.State != runtimeapi.ContainerState_CONTAINER_EXITED {
			return fmt.Errorf("container is %v", status.State)
		}
		return nil
	})
	if status.ExitCode != 0 {
		return fmt.Errorf("container ended with %d", status.ExitCode)
	}
	return nil
}
