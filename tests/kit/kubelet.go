package kit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// kubeletModule is the module that the kubelet is built from, relative to that of
// the tests.
const kubeletModule = "node/kubelet"

// BuildKubelet compiles the kubelet at the version that the go.mod of
// tests/node/kubelet requires, unless an earlier call did, and returns its path.
// The first call downloads 240 modules and compiles for ten minutes and more.
func BuildKubelet(ctx context.Context) (string, error) {
	tests, bin, unlock, err := binDir("kubelet")
	if err != nil {
		return "", err
	}
	defer unlock()
	module := filepath.Join(tests, kubeletModule)
	version, err := run(ctx, module, nil, "go", "list", "-m", "-f", "{{.Version}}", "k8s.io/kubernetes")
	if err != nil {
		return "", fmt.Errorf("version of the kubelet: %w", err)
	}
	version = strings.TrimSpace(version)
	path := filepath.Join(bin, "kubelet-"+version)
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		return path, err
	}
	flags := "-ldflags=-s -w -X k8s.io/component-base/version.gitVersion=" + version
	if err := goBuild(ctx, module, path+".new", flags, "k8s.io/kubernetes/cmd/kubelet"); err != nil {
		return "", fmt.Errorf("build kubelet %s: %w", version, err)
	}
	return path, os.Rename(path+".new", path)
}

// KubeletOptions describe one kubelet.
type KubeletOptions struct {
	Binary     string      // of BuildKubelet
	Containerd *Containerd // with its CRI plugin
	Dir        string      // what a power cut may take: its root directory and the logs of pods
	RunDir     string      // configuration, manifests, certificate and log
	Config     string      // further lines of the configuration file, YAML
}

// Kubelet is a kubelet without an API server: its pods are the manifests of a
// directory. Its containers use the host's network, and its cgroups are below the
// run's.
type Kubelet struct {
	*Process
	opts  KubeletOptions
	url   string
	start int64 // length of the log at the latest start
}

// NewKubelet prepares the directories, and covers what a kubelet changes of a
// machine, for all processes of the mount namespace that [Main] has made.
func NewKubelet(opts KubeletOptions) (*Kubelet, error) {
	if err := coverHost(); err != nil {
		return nil, fmt.Errorf("kubelet: cover the host: %w", err)
	}
	k := &Kubelet{opts: opts}
	for _, dir := range []string{opts.Dir, k.manifests()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("kubelet: %w", err)
		}
	}
	return k, nil
}

// tunables are what a kubelet writes when it starts, and does not start without.
var tunables = []string{
	"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
	"kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
}

// coverHost puts files of ours over the kernel's tunables, and empty file systems
// over the directories whose names are compiled into the kubelet: below /var/lib
// the sockets of device plugins, below /var/log the links to the logs of containers.
// The mount points themselves may be missing on a machine without a kubelet.
var coverHost = sync.OnceValue(func() error {
	if !Inside() {
		return errors.New("not in a mount namespace of our own")
	}
	for _, dir := range []string{"/var/lib", "/var/log"} {
		if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
			return os.NewSyscallError("mount "+dir, err)
		}
	}
	for _, name := range tunables {
		kernel := filepath.Join("/proc/sys", name)
		value, err := os.ReadFile(kernel)
		if err != nil {
			return err
		}
		ours := filepath.Join(os.TempDir(), strings.ReplaceAll(name, "/", "-"))
		if err := os.WriteFile(ours, value, 0o644); err != nil {
			return err
		}
		if err := unix.Mount(ours, kernel, "", unix.MS_BIND, ""); err != nil {
			return os.NewSyscallError("mount "+kernel, err)
		}
	}
	return nil
})

func (k *Kubelet) manifests() string  { return filepath.Join(k.opts.RunDir, "manifests") }
func (k *Kubelet) configPath() string { return filepath.Join(k.opts.RunDir, "kubelet.yaml") }

// Records lists the files in which the kubelet keeps what it knows of pulls, one for
// each image that it is pulling, and one for each that it has pulled.
func (k *Kubelet) Records() (pulling, pulled []string, err error) {
	top := filepath.Join(k.opts.Dir, "root", "image_manager")
	if pulling, err = filepath.Glob(filepath.Join(top, "pulling", "sha256-*")); err == nil {
		pulled, err = filepath.Glob(filepath.Join(top, "pulled", "sha256-*"))
	}
	return pulling, pulled, err
}

// StaticPod is a pod of one container.
type StaticPod struct {
	Name    string
	Image   string
	Policy  string // Always, IfNotPresent or Never
	Command []string
}

// Place writes the manifest of a pod, which a running kubelet notices.
func (k *Kubelet) Place(p StaticPod) error {
	type object = map[string]any
	text, err := json.Marshal(object{
		"apiVersion": "v1", "kind": "Pod",
		"metadata": object{"name": p.Name, "namespace": "default"},
		"spec": object{
			"hostNetwork": true, "enableServiceLinks": false, "terminationGracePeriodSeconds": 1,
			"containers": []object{{"name": "main", "image": p.Image, "imagePullPolicy": p.Policy, "command": p.Command}},
		},
	})
	if err != nil {
		return err
	}
	// The kubelet skips names that begin with a dot.
	hidden := filepath.Join(k.manifests(), "."+p.Name)
	if err := os.WriteFile(hidden, text, 0o644); err != nil {
		return fmt.Errorf("static pod: %w", err)
	}
	return os.Rename(hidden, filepath.Join(k.manifests(), p.Name+".json"))
}

// Take removes the manifest of a pod, whose containers a running kubelet then ends
// and removes.
func (k *Kubelet) Take(name string) error {
	return os.Remove(filepath.Join(k.manifests(), name+".json"))
}

// config is what a standalone kubelet needs, with ports that are free now.
func (k *Kubelet) config(port, readOnly int) string {
	return fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: 127.0.0.1
port: %d
readOnlyPort: %d
healthzPort: 0
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
containerRuntimeEndpoint: "unix://%s"
staticPodPath: %q
podLogsDir: %q
volumePluginDir: %q
failCgroupV1: false
failSwapOn: false
cgroupDriver: cgroupfs
cgroupRoot: "/%s"
enforceNodeAllocatable: []
makeIPTablesUtilChains: false
evictionHard: {}
%s`, port, readOnly, k.opts.Containerd.Address, k.manifests(), filepath.Join(k.opts.Dir, "logs"), filepath.Join(k.opts.Dir, "volume-plugins"),
		os.Getenv(runVar), k.opts.Config)
}

// Start starts the kubelet, again after it was stopped or killed, and returns when
// it serves.
func (k *Kubelet) Start(ctx context.Context) error {
	if err := makeCgroups(os.Getenv(runVar)); err != nil {
		return fmt.Errorf("kubelet: %w", err)
	}
	ports, err := freePorts(2)
	if err != nil {
		return fmt.Errorf("kubelet: %w", err)
	}
	if err := os.WriteFile(k.configPath(), []byte(k.config(ports[0], ports[1])), 0o644); err != nil {
		return fmt.Errorf("kubelet: %w", err)
	}
	k.url = fmt.Sprintf("http://127.0.0.1:%d", ports[1])
	log := filepath.Join(k.opts.RunDir, "kubelet.log")
	if st, err := os.Stat(log); err == nil {
		k.start = st.Size()
	}
	// The certificate is not on the disk: the kubelet makes it at its first start, does not
	// sync it, and does not start with an empty one. On a node that is older than
	// half a minute the kernel has written it.
	k.Process, err = StartProcess("kubelet", log, nil, k.opts.Binary, "--config", k.configPath(), "-v=2",
		"--root-dir", filepath.Join(k.opts.Dir, "root"), "--cert-dir", filepath.Join(k.opts.RunDir, "pki"),
		"--hostname-override", kubeletHost, "--fail-cgroupv1=false")
	if err != nil {
		return err
	}
	err = k.WaitReady(ctx, slow, func(ctx context.Context) error {
		_, err := k.get(ctx, "/healthz")
		return err
	})
	if err != nil {
		return errors.Join(err, k.Kill())
	}
	return nil
}

// kubeletHost ends the names of all static pods.
const kubeletHost = "node"

// makeCgroups makes the cgroup that the kubelet's are below, in each hierarchy,
// which it demands. What is in there goes at the end of the run at the latest.
func makeCgroups(run string) error {
	hierarchies := []string{"/sys/fs/cgroup"}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err != nil {
		if hierarchies, err = filepath.Glob("/sys/fs/cgroup/*"); err != nil {
			return err
		}
	}
	for _, h := range hierarchies {
		if err := os.Mkdir(filepath.Join(h, run), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return nil
}

// freePorts finds TCP ports of the loopback interface that are free now. Another
// process may take one before its use, which then fails.
func freePorts(n int) (ports []int, err error) {
	for range n {
		l, e := net.Listen("tcp", "127.0.0.1:0")
		if e != nil {
			return nil, errors.Join(err, e)
		}
		defer func() { err = errors.Join(err, l.Close()) }()
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	return ports, nil
}

func (k *Kubelet) get(ctx context.Context, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, k.url+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, fmt.Errorf("kubelet: %w", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("kubelet: %s: %s: %s", path, resp.Status, body)
	}
	return body, err
}

// PodState is what the kubelet reports of the container of a pod.
type PodState struct {
	Running     bool
	Reason      string // when it does not run: of this and of the end of the last attempt
	ContainerID string
	Failures    int // attempts to bring the pod up that have failed since the kubelet's start
}

// Pods reports the pods by name.
func (k *Kubelet) Pods(ctx context.Context) (map[string]PodState, error) {
	body, err := k.get(ctx, "/pods")
	if err != nil {
		return nil, err
	}
	type ended struct{ Reason, Message string }
	var list struct {
		Items []struct {
			Metadata struct{ Name string }
			Status   struct {
				ContainerStatuses []struct {
					ContainerID string
					State       struct {
						Running             *struct{}
						Waiting, Terminated *ended
					}
					LastState struct{ Terminated *ended }
				}
			}
		}
	}
	if err := json.Unmarshal(body, &list); err != nil {
		return nil, fmt.Errorf("kubelet: /pods: %w", err)
	}
	failures, err := k.failures()
	if err != nil {
		return nil, err
	}
	pods := map[string]PodState{}
	for _, p := range list.Items {
		state := PodState{Failures: failures[p.Metadata.Name]}
		for _, c := range p.Status.ContainerStatuses {
			state.Running, state.ContainerID = c.State.Running != nil, c.ContainerID
			for _, e := range []*ended{c.State.Waiting, c.State.Terminated, c.LastState.Terminated} {
				if e != nil && !state.Running {
					state.Reason += fmt.Sprintf("; %s %s", e.Reason, e.Message)
				}
			}
		}
		pods[strings.TrimSuffix(p.Metadata.Name, "-"+kubeletHost)] = state
	}
	return pods, nil
}

// failures counts, by pod, the attempts of which the kubelet has logged that they
// failed.
func (k *Kubelet) failures() (map[string]int, error) {
	log, err := os.ReadFile(k.log)
	if err != nil {
		return nil, err
	}
	all := map[string]int{}
	for line := range bytes.Lines(log[k.start:]) {
		if !bytes.Contains(line, []byte(`"Error syncing pod, skipping"`)) {
			continue
		}
		if _, after, ok := bytes.Cut(line, []byte(`pod="default/`)); ok {
			name, _, _ := bytes.Cut(after, []byte(`"`))
			all[string(name)]++
		}
	}
	return all, nil
}

// FsStats are the kubelet's figures of a file system, in bytes.
type FsStats struct{ AvailableBytes, CapacityBytes, UsedBytes uint64 }

// ImageFs reports what the kubelet has on record of the file system of the images: what
// its garbage collection and its evictions are decided by.
func (k *Kubelet) ImageFs(ctx context.Context) (FsStats, error) {
	body, err := k.get(ctx, "/stats/summary")
	if err != nil {
		return FsStats{}, err
	}
	var s struct {
		Node struct {
			Runtime struct{ ImageFs *FsStats }
		}
	}
	if err := json.Unmarshal(body, &s); err != nil {
		return FsStats{}, fmt.Errorf("kubelet: /stats/summary: %w", err)
	}
	if s.Node.Runtime.ImageFs == nil {
		return FsStats{}, errors.New("kubelet: /stats/summary has no file system of images: " + strconv.Quote(string(body)))
	}
	return *s.Node.Runtime.ImageFs, nil
}
