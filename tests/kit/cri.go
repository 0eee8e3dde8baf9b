package kit

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// CRINamespace is where the CRI plugin keeps what it makes in containerd.
const CRINamespace = "k8s.io"

// CRIOptions configure containerd's CRI plugin.
type CRIOptions struct {
	Pause       string // name of the image of all sandboxes
	Images      string // further keys of the plugin's configuration of images; before 2.0, of its table containerd
	Snapshotter string // "durable" unless set
}

// config is the plugin's part of containerd's configuration of a version.
func (o *CRIOptions) config(runDir string, version int) string {
	snapshotter, cni := cmp.Or(o.Snapshotter, "durable"), filepath.Join(runDir, "cni")
	if version < 3 {
		return fmt.Sprintf(criVersion2, o.Pause, snapshotter, o.Images, cni)
	}
	return fmt.Sprintf(criVersion3, snapshotter, o.Images, o.Pause, cni)
}

const criVersion3 = `
[plugins.'io.containerd.cri.v1.images']
  snapshotter = %q
  %s
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = %q
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true # for machines that give root no CAP_SYS_RESOURCE
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    conf_dir = %q
[plugins.'io.containerd.nri.v1.nri']
  disable = true
`

const criVersion2 = `
[plugins.'io.containerd.grpc.v1.cri']
  sandbox_image = %q
  restrict_oom_score_adj = true
  [plugins.'io.containerd.grpc.v1.cri'.containerd]
    snapshotter = %q
    %s
    [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]
      runtime_type = 'io.containerd.runc.v2'
  [plugins.'io.containerd.grpc.v1.cri'.cni]
    conf_dir = %q
[plugins.'io.containerd.nri.v1.nri']
  disable = true
`

// criLimit bounds each question to the CRI plugin: one that hangs shall not take
// the whole run with it.
const criLimit = 3 * time.Minute

// CRI queries containerd's CRI plugin as the kubelet does. The two services are
// there for what has no method here.
type CRI struct {
	Runtime    runtimeapi.RuntimeServiceClient
	Images     runtimeapi.ImageServiceClient
	containerd *Containerd
	conn       *grpc.ClientConn
}

// made counts pods and containers, for their names. Those of one containerd outlive the CRI that
// has made them.
var made atomic.Int64

// DialCRI connects to the CRI plugin of a containerd that was started with CRI.
func DialCRI(cd *Containerd) (*CRI, error) {
	c := &CRI{containerd: cd}
	return c, c.connect()
}

func (c *CRI) connect() (err error) {
	if c.conn, err = dial(c.containerd.Address); err != nil {
		return err
	}
	c.Runtime, c.Images = runtimeapi.NewRuntimeServiceClient(c.conn), runtimeapi.NewImageServiceClient(c.conn)
	return nil
}

// Redial connects anew after a start of containerd, and waits until the plugin
// serves: it reads all images before. The old connection would wait out
// grpc's backoff.
func (c *CRI) Redial(ctx context.Context) error {
	if err := errors.Join(c.Close(), c.connect()); err != nil {
		return err
	}
	return c.containerd.WaitReady(ctx, criLimit, func(ctx context.Context) error {
		_, err := c.Runtime.Status(ctx, &runtimeapi.StatusRequest{})
		return err
	})
}

// Close closes the connection.
func (c *CRI) Close() error { return c.conn.Close() }

// Pull pulls as the kubelet does.
func (c *CRI) Pull(ctx context.Context, ref string) error {
	ctx, cancel := context.WithTimeout(ctx, criLimit)
	defer cancel()
	_, err := c.Images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	return err
}

// Known reports whether the plugin knows an image, which the kubelet checks before it
// pulls (IfNotPresent).
func (c *CRI) Known(ctx context.Context, ref string) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, criLimit)
	defer cancel()
	r, err := c.Images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	return r.GetImage() != nil, err
}

// List returns the names of all images that the plugin lists, with tags.
func (c *CRI) List(ctx context.Context) (refs []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, criLimit)
	defer cancel()
	r, err := c.Images.ListImages(ctx, &runtimeapi.ListImagesRequest{})
	for _, i := range r.GetImages() {
		refs = append(refs, i.RepoTags...)
	}
	return refs, err
}

// WaitKnown waits until the plugin has been notified of what containerd did with an image.
func (c *CRI) WaitKnown(ctx context.Context, ref string, want bool) error {
	for deadline := time.Now().Add(slow); ; time.Sleep(20 * time.Millisecond) {
		known, err := c.Known(ctx, ref)
		if err != nil || known == want {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("after %v, the CRI plugin knows %s: %v", slow, ref, known)
		}
	}
}

// host is the host's network, because a pod network needs plugins that are no
// part of containerd.
var host = &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE}

// kubeletLabels are some of those that the kubelet gives to all it makes.
func kubeletLabels(pod, container string) map[string]string {
	l := map[string]string{"io.kubernetes.pod.name": pod, "io.kubernetes.pod.namespace": "default"}
	if container != "" {
		l["io.kubernetes.container.name"] = container
	}
	return l
}

// name makes a name that no other pod or container of this process has.
func (c *CRI) name(kind string) string { return fmt.Sprintf("%s%d", kind, made.Add(1)) }

// Pod is a sandbox that runs the pause image.
type Pod struct {
	ID     string
	cri    *CRI
	config *runtimeapi.PodSandboxConfig
}

// Name is the pod's name for the kubelet.
func (p *Pod) Name() string { return p.config.Metadata.Name }

// StartPod starts a sandbox.
func (c *CRI) StartPod(ctx context.Context) (*Pod, error) {
	name := c.name("pod")
	p := &Pod{cri: c, config: &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: name, Uid: "uid-of-" + name, Namespace: "default"},
		Labels:   kubeletLabels(name, ""),
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent:    "/" + c.containerd.Namespace,
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: host},
		},
	}}
	ctx, cancel := context.WithTimeout(ctx, criLimit)
	defer cancel()
	r, err := c.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: p.config})
	if err != nil {
		return nil, err
	}
	p.ID = r.PodSandboxId
	return p, nil
}

// Remove removes a sandbox with all its containers. Doing it twice is no error.
func (p *Pod) Remove(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, criLimit)
	defer cancel()
	_, stopped := p.cri.Runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.ID})
	_, removed := p.cri.Runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.ID})
	return errors.Join(stopped, removed)
}

// Via returns the pod as another connection to the same containerd reaches it.
func (p *Pod) Via(c *CRI) *Pod { return &Pod{ID: p.ID, cri: c, config: p.config} }

// RemovePods removes all sandboxes that the plugin lists, also those that a power cut has ended
// or whose creation was cut short, as the kubelet does.
func (c *CRI) RemovePods(ctx context.Context) error {
	limited, cancel := context.WithTimeout(ctx, criLimit)
	defer cancel()
	r, err := c.Runtime.ListPodSandbox(limited, &runtimeapi.ListPodSandboxRequest{})
	for _, s := range r.GetItems() {
		err = errors.Join(err, (&Pod{ID: s.Id, cri: c}).Remove(ctx))
	}
	return err
}

// Create creates a container that will run a command, and returns its ID.
func (p *Pod) Create(ctx context.Context, ref string, command ...string) (string, error) {
	name := p.cri.name("container")
	ctx, cancel := context.WithTimeout(ctx, criLimit)
	defer cancel()
	r, err := p.cri.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId: p.ID, SandboxConfig: p.config,
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: name},
			Labels:   kubeletLabels(p.config.Metadata.Name, name),
			Image:    &runtimeapi.ImageSpec{Image: ref},
			Command:  command,
			Linux:    &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{NamespaceOptions: host}},
		},
	})
	if err != nil {
		return "", err
	}
	return r.ContainerId, nil
}

// Start starts a container.
func (p *Pod) Start(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, criLimit)
	defer cancel()
	_, err := p.cri.Runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
	return err
}

// Wait waits until a container has ended, and returns its exit code.
func (p *Pod) Wait(ctx context.Context, id string) (code int32, err error) {
	err = p.cri.containerd.WaitReady(ctx, criLimit, func(ctx context.Context) error {
		r, err := p.cri.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
		if err != nil {
			return err
		}
		if r.Status.State != runtimeapi.ContainerState_CONTAINER_EXITED {
			return fmt.Errorf("container %s is %v", id, r.Status.State)
		}
		code = r.Status.ExitCode
		return nil
	})
	return code, err
}

// Running reports whether a container runs.
func (p *Pod) Running(ctx context.Context, id string) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, criLimit)
	defer cancel()
	r, err := p.cri.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
	return r.GetStatus().GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING, err
}

// StopContainer ends a container with SIGKILL.
func (p *Pod) StopContainer(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, criLimit)
	defer cancel()
	_, err := p.cri.Runtime.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id})
	return err
}

// RemoveContainer removes a container, running or not, and its snapshot.
func (p *Pod) RemoveContainer(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, criLimit)
	defer cancel()
	_, err := p.cri.Runtime.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id})
	return err
}
