package configs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	introspection "github.com/containerd/containerd/api/services/introspection/v1"
	"github.com/containerd/containerd/v2/client"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// What the programs use by default, and the documentation names.
const (
	mainFile   = "/etc/containerd/config.toml"
	confd      = "/etc/containerd/conf.d/durable.toml"
	durableDir = "/var/lib/durable-snapshotter"
	socket     = "/run/containerd/containerd.sock"
)

// machine is this machine with directories of its own where containerd and the
// daemon have their files.
type machine struct {
	bins    kit.Binaries
	release string // of containerd
	socket  string // of containerd
	process *kit.Process
	logs    string
}

// newMachine covers /etc, /opt, /run and /var/lib until the end of the test.
func newMachine(t *testing.T, release string) *machine {
	t.Helper()
	m := &machine{bins: kittest.Release(t, release), release: release, socket: socket, logs: kittest.Scratch(t)}
	disk := kittest.NewDisk(t, kit.DiskOptions{Size: 1 << 30})
	layers := kittest.Scratch(t)
	for _, dir := range []string{"/etc", "/opt", "/var/lib"} {
		upper, work := filepath.Join(layers, dir, "upper"), filepath.Join(layers, dir, "work")
		check(t, errors.Join(os.MkdirAll(upper, 0o755), os.MkdirAll(work, 0o755)))
		mount(t, "overlay", dir, "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", dir, upper, work))
	}
	mount(t, "tmpfs", "/run", "tmpfs", 0, "mode=755")
	for _, dir := range []string{"durable-snapshotter", "containerd", "rancher"} {
		target := filepath.Join("/var/lib", dir)
		check(t, errors.Join(os.MkdirAll(disk.Path(dir), 0o700), os.MkdirAll(target, 0o700)))
		mount(t, disk.Path(dir), target, "", unix.MS_BIND, "")
	}
	// What this machine may have must not be what the test finds.
	check(t, errors.Join(os.RemoveAll("/etc/containerd"), os.RemoveAll("/etc/durable-snapshotter"), os.MkdirAll("/etc/containerd", 0o755)))
	return m
}

func mount(t *testing.T, source, target, fs string, flags uintptr, data string) {
	t.Helper()
	if err := unix.Mount(source, target, fs, flags, data); err != nil {
		t.Fatalf("mount %s on %s: %v", source, target, err)
	}
	t.Cleanup(func() {
		// Sockets and bind mounts of the programs are below.
		if err := unix.Unmount(target, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", target, err)
		}
	})
}

// write makes a file with the directories above it.
func write(t *testing.T, path, text string) {
	t.Helper()
	check(t, os.MkdirAll(filepath.Dir(path), 0o755))
	check(t, os.WriteFile(path, []byte(text), 0o644))
}

// configDefault is what a distribution or an administrator makes the main file of.
func (m *machine) configDefault(t *testing.T) string {
	t.Helper()
	out, err := exec.Command(m.bins.Containerd, "config", "default").Output()
	if err != nil {
		t.Fatalf("containerd %s config default: %v", m.release, err)
	}
	return string(out)
}

// start starts the daemon the way the README does, and containerd. Its error is
// that containerd ended, or did not answer.
func (m *machine) start(t *testing.T, args ...string) error {
	t.Helper()
	daemon := must[*kit.Process](t)(kit.StartProcess("durable-snapshotter", filepath.Join(m.logs, "daemon"), nil, m.bins.Daemon, "serve"))
	t.Cleanup(func() { kittest.Stop(t, daemon) })
	check(t, daemon.WaitReady(t.Context(), time.Minute, func(context.Context) error {
		_, err := os.Stat("/run/durable-snapshotter/durable-snapshotter.sock")
		return err
	}))

	return m.startContainerd(t, args...)
}

// startContainerd is start without the daemon.
func (m *machine) startContainerd(t *testing.T, args ...string) error {
	t.Helper()
	env := []string{"PATH=" + m.bins.Dir + ":" + os.Getenv("PATH")}
	m.process = must[*kit.Process](t)(kit.StartProcess("containerd", filepath.Join(m.logs, "containerd"), env,
		append([]string{m.bins.Containerd}, args...)...))
	t.Cleanup(func() { kittest.Stop(t, m.process) })
	return m.process.WaitReady(t.Context(), time.Minute, func(ctx context.Context) error {
		if _, err := os.Stat(m.socket); err != nil {
			return err
		}
		c, err := m.client()
		if err != nil {
			return err
		}
		defer c.Close()
		ok, err := c.IsServing(ctx)
		if err == nil && !ok {
			err = errors.New("not serving")
		}
		return err
	})
}

func (m *machine) client() (*client.Client, error) {
	return client.New(m.socket, client.WithDefaultNamespace(kit.CRINamespace), client.WithTimeout(30*time.Second))
}

// ctr runs the release's own ctr in the namespace of Kubernetes.
func (m *machine) ctr(t *testing.T, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, m.bins.Ctr, append([]string{"--address", m.socket, "--namespace", kit.CRINamespace}, args...)...).CombinedOutput()
	return string(out), err
}

// holds reports whether a snapshotter of the running containerd has a layer.
func (m *machine) holds(t *testing.T, snapshotter, layer string) bool {
	t.Helper()
	out, err := m.ctr(t, "snapshots", "--snapshotter", snapshotter, "ls")
	if err != nil {
		t.Fatalf("ctr snapshots ls: %v\n%s", err, out)
	}
	return strings.Contains(out, layer)
}

// committed reports whether the daemon itself lists a layer.
func (m *machine) committed(t *testing.T, layer string) bool {
	t.Helper()
	out, err := exec.Command(m.bins.Daemon, "inspect").CombinedOutput()
	if err != nil {
		t.Fatalf("durable-snapshotter inspect: %v\n%s", err, out)
	}
	return strings.Contains(string(out), layer)
}

// expectContent fails the test unless the daemon searches for blobs and for containerd
// where they are.
func (m *machine) expectContent(t *testing.T, img kit.Pushed) {
	t.Helper()
	out := must[[]byte](t)(exec.Command(m.bins.Daemon, "config").Output())
	root := regexp.MustCompile(`(?m)^content_root = '(.*)'$`).FindSubmatch(out)
	address := regexp.MustCompile(`(?s)\[containerd\].*?\naddress = '([^']*)'`).FindSubmatch(out)
	if root == nil || address == nil {
		t.Fatalf("no content_root or address in the daemon's configuration:\n%s", out)
	}
	if _, err := os.Stat(filepath.Join(string(root[1]), "blobs", "sha256", img.Layers[0].Digest.Encoded())); err != nil {
		t.Errorf("the daemon's content_root is not containerd's: %v", err)
	}
	if string(address[1]) != m.socket {
		t.Errorf("the daemon's address of containerd is %s, want %s", address[1], m.socket)
	}
}

// effect is what a running containerd does, whatever its files contain.
type effect struct {
	// Snapshotter is the one that got the layers of an image that the kubelet's
	// request pulled.
	Snapshotter string
	// ImageFs is where the images are, as reported to the kubelet.
	ImageFs string
	// Pause reports that the main file's pause image is still the one of all
	// sandboxes, which the garbage collection of the kubelet leaves alone.
	Pause bool
	// SystemdCgroup is that option of the runtime runc.
	SystemdCgroup bool
}

// observe queries the running containerd.
func (m *machine) observe(t *testing.T) effect {
	t.Helper()
	conn := must[*grpc.ClientConn](t)(grpc.NewClient("unix://"+m.socket, grpc.WithTransportCredentials(insecure.NewCredentials())))
	defer conn.Close()
	runtime, images := runtimeapi.NewRuntimeServiceClient(conn), runtimeapi.NewImageServiceClient(conn)

	var e effect
	var status *runtimeapi.StatusResponse
	check(t, m.process.WaitReady(t.Context(), time.Minute, func(ctx context.Context) (err error) {
		status, err = runtime.Status(ctx, &runtimeapi.StatusRequest{Verbose: true})
		return err
	}))
	var config struct {
		SandboxImage string `json:"sandboxImage"` // until 1.7
		Containerd   struct {
			Runtimes map[string]struct {
				Options map[string]any `json:"options"`
			} `json:"runtimes"`
		} `json:"containerd"`
	}
	check(t, json.Unmarshal([]byte(status.Info["config"]), &config))
	runc, ok := config.Containerd.Runtimes["runc"]
	if !ok {
		t.Errorf("the runtime runc is lost: %v", slices.Collect(maps.Keys(config.Containerd.Runtimes)))
	}
	e.SystemdCgroup, _ = runc.Options["SystemdCgroup"].(bool)

	img := push(t)
	pull := func(ref string) *runtimeapi.Image {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		spec := &runtimeapi.ImageSpec{Image: ref}
		if _, err := images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: spec}); err != nil {
			t.Fatalf("CRI PullImage: %v\n%s", err, m.process.LogTail(2000))
		}
		return must[*runtimeapi.ImageStatusResponse](t)(images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: spec})).Image
	}
	pull(img.Ref)
	for _, name := range []string{"durable", "overlayfs"} {
		if m.plugin(t, "io.containerd.snapshotter.v1", name) != nil && m.holds(t, name, img.Top()) {
			e.Snapshotter = name
		}
	}
	if e.Snapshotter == "durable" && !m.committed(t, img.Top()) {
		t.Errorf("containerd lists %s under durable, the daemon does not", img.Top())
	}
	m.expectContent(t, img)
	fs := must[*runtimeapi.ImageFsInfoResponse](t)(images.ImageFsInfo(t.Context(), &runtimeapi.ImageFsInfoRequest{}))
	if len(fs.ImageFilesystems) == 1 {
		e.ImageFs = fs.ImageFilesystems[0].FsId.Mountpoint
	}
	if config.SandboxImage != "" {
		e.Pause = config.SandboxImage == pauseRef()
	} else {
		pushPause(t)
		e.Pause = pull(pauseRef()).Pinned
	}
	return e
}

// plugin returns what the running containerd reports on a plugin.
func (m *machine) plugin(t *testing.T, kind, id string) *introspection.Plugin {
	t.Helper()
	conn := must[*client.Client](t)(m.client())
	defer conn.Close()
	r, err := conn.IntrospectionService().Plugins(t.Context(), "type=="+kind)
	check(t, err)
	for _, p := range r.Plugins {
		if p.ID == id {
			return p
		}
	}
	return nil
}

// expectProxy compares the running containerd's snapshotter "durable" with the
// table in the documented text.
func (m *machine) expectProxy(t *testing.T, texts map[string]string, keys []string) {
	t.Helper()
	p := m.plugin(t, "io.containerd.snapshotter.v1", "durable")
	if p == nil {
		t.Error("containerd has no snapshotter durable")
		return
	}
	var want []string
	for _, key := range keys {
		if list := capabilities.FindStringSubmatch(texts[key]); list != nil {
			want = strings.Split(strings.ReplaceAll(list[1], `"`, ""), ", ")
		}
	}
	if len(want) == 0 {
		t.Errorf("none of the texts %q has capabilities", keys)
	}
	if !kit.Since(m.release, "1.7.35") {
		want = nil // it does not know the key
	}
	if !slices.Equal(p.Capabilities, want) {
		t.Errorf("capabilities %q, want %q", p.Capabilities, want)
	}
	if m.release != kit.Debian && p.Exports["root"] != durableDir {
		t.Errorf("exports %v, want the root %s", p.Exports, durableDir)
	}
}

var capabilities = regexp.MustCompile(`(?m)^ *capabilities = \[(.*)\]$`)

// criError is why the CRI plugin is not loaded.
func (m *machine) criError(t *testing.T) string {
	t.Helper()
	p := m.plugin(t, "io.containerd.grpc.v1", "cri")
	if p == nil || p.InitErr == nil {
		return ""
	}
	return p.InitErr.Message
}

// pullWithCtr pulls through the path that ctr image pull takes by default, which
// is the transfer service from containerd 2.0 on.
func (m *machine) pullWithCtr(t *testing.T, snapshotter string) {
	t.Helper()
	img := push(t)
	if out, err := m.ctr(t, "image", "pull", "--plain-http", "--snapshotter", snapshotter, img.Ref); err != nil {
		t.Errorf("ctr image pull --snapshotter %s: %v\n%s", snapshotter, err, out)
		return
	}
	if !m.holds(t, snapshotter, img.Top()) {
		t.Errorf("after ctr image pull --snapshotter %s it does not have the layer", snapshotter)
	}
}

// byDiffer reports whether our differ has made a layer durable.
func (m *machine) byDiffer(t *testing.T) bool {
	t.Helper()
	out := must[[]byte](t)(exec.CommandContext(t.Context(), m.bins.Daemon, "inspect").CombinedOutput())
	return strings.Contains(string(out), "syncfs, in Apply")
}

var pushed int

// push pushes an image of two layers that no other call has pushed.
func push(t *testing.T) kit.Pushed {
	t.Helper()
	pushed++
	name := fmt.Sprintf("image%d", pushed)
	img, err := kit.Push(t.Context(), registry, name, kit.Image{Layers: []kit.Layer{
		kit.NewLayer(kit.Gzip, kit.Dir("etc", 0o755), kit.File("etc/name", 0o644, name)),
		kit.NewLayer(kit.Zstd, kit.Dir("bin", 0o755), kit.File("bin/name", 0o755, name)),
	}})
	return must[kit.Pushed](t)(img, err)
}

// pauseRef is the pause image of the main files.
func pauseRef() string { return registry.Ref("pause") }

func pushPause(t *testing.T) {
	t.Helper()
	_, err := kit.Push(t.Context(), registry, "pause", kit.Image{Layers: []kit.Layer{
		kit.NewLayer(kit.Gzip, kit.File("pause", 0o755, "pause")),
	}})
	check(t, err)
}
