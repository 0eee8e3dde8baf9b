package kit

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/client"
)

// DifferFirst, in the field Extra, has containerd's diff service ask the daemon's first, for
// every snapshotter.
const DifferFirst = "[plugins.'io.containerd.service.v1.diff-service']\n  default = ['durable-diff', 'walking']\n"

// ContainerdOptions describe one containerd.
type ContainerdOptions struct {
	Binaries      Binaries
	Dir           string      // root and, unless RunDir is set, everything else
	RunDir        string      // state, sockets, config and log: what a power cut empties
	Daemon        *Daemon     // the proxy plugin "durable"; none when nil
	CRI           *CRIOptions // of its CRI plugin, which is disabled when nil
	ConfigVersion int         // 3 unless set, see the function of this name
	Unpacks       int         // layers that it unpacks at a time, with the capability rebase; one after another when 0
	Differ        []string    // snapshotters whose layers the transfer service has the daemon's diff service, "durable-diff", extract
	LogLevel      string      // debug unless set
	Extra         string      // further text for the configuration file
}

// Containerd is a running containerd.
type Containerd struct {
	*Process
	Root      string
	Address   string
	Namespace string // of Ctr and Client; unique to the run, as it names cgroups too
	opts      ContainerdOptions
}

// StartContainerd writes the configuration, starts containerd and waits until
// its API answers.
func StartContainerd(ctx context.Context, opts ContainerdOptions) (*Containerd, error) {
	if opts.RunDir == "" {
		opts.RunDir = filepath.Join(opts.Dir, "run")
	}
	if opts.ConfigVersion == 0 {
		opts.ConfigVersion = 3
	}
	c := &Containerd{
		Root:      filepath.Join(opts.Dir, "root"),
		Address:   filepath.Join(opts.RunDir, "containerd.sock"),
		Namespace: "default",
		opts:      opts,
	}
	if run := os.Getenv(runVar); run != "" {
		c.Namespace = run
	}
	for _, dir := range []string{opts.Dir, opts.RunDir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("containerd: %w", err)
		}
	}
	if err := c.Use(opts.Daemon); err != nil {
		return nil, err
	}
	return c, c.Start(ctx)
}

// Use writes the configuration for the next start: with d as the proxy plugin
// "durable", or without that plugin when d is nil.
func (c *Containerd) Use(d *Daemon) error {
	c.opts.Daemon = d
	if err := os.WriteFile(c.configPath(), []byte(c.config()), 0o644); err != nil {
		return fmt.Errorf("containerd: %w", err)
	}
	return nil
}

func (c *Containerd) configPath() string { return filepath.Join(c.opts.RunDir, "config.toml") }

// state is containerd's directory below /run: a boot empties it.
func (c *Containerd) state() string { return filepath.Join(c.opts.RunDir, "state") }

// LogPath is the file all starts of this containerd log to.
func (c *Containerd) LogPath() string { return filepath.Join(c.opts.RunDir, "containerd.log") }

// config is what a user would write to point containerd at the daemon, apart
// from the directories.
func (c *Containerd) config() string {
	var b strings.Builder
	v3 := c.opts.ConfigVersion >= 3
	fmt.Fprintf(&b, "version = %d\nroot = %q\nstate = %q\n", c.opts.ConfigVersion, c.Root, c.state())
	if c.opts.CRI == nil {
		if v3 {
			b.WriteString("disabled_plugins = ['io.containerd.cri.v1.images', 'io.containerd.cri.v1.runtime', 'io.containerd.grpc.v1.cri']\n")
		} else {
			b.WriteString("disabled_plugins = ['io.containerd.grpc.v1.cri']\n")
		}
	}
	fmt.Fprintf(&b, "[grpc]\n  address = %q\n[ttrpc]\n  address = %q\n[debug]\n  level = %q\n", c.Address, c.Address+".ttrpc", cmp.Or(c.opts.LogLevel, "debug"))
	// The opt plugin would make /opt/containerd on the host.
	fmt.Fprintf(&b, "[plugins.'io.containerd.internal.v1.opt']\n  path = %q\n", filepath.Join(c.opts.RunDir, "opt"))
	snapshotters := []string{"overlayfs"}
	if d := c.opts.Daemon; d != nil {
		snapshotters = append(snapshotters, "durable")
		fmt.Fprintf(&b, "[proxy_plugins.durable]\n  type = 'snapshot'\n  address = %q\n", d.Address)
		if c.opts.Unpacks > 0 {
			b.WriteString("  capabilities = ['rebase']\n")
		}
		// Without exports.root the CRI reports the wrong file system to the kubelet;
		// Debian's release does not know the key, and ignores it.
		fmt.Fprintf(&b, "  [proxy_plugins.durable.exports]\n    root = %q\n", d.Root)
	}
	if d := c.opts.Daemon; d != nil && len(c.opts.Differ) > 0 {
		fmt.Fprintf(&b, "[proxy_plugins.durable-diff]\n  type = 'diff'\n  address = %q\n", d.Address)
	}
	// unpack_config replaces containerd's defaults, so overlayfs is repeated.
	for _, name := range snapshotters {
		differ := "walking"
		if slices.Contains(c.opts.Differ, name) {
			differ = "durable-diff"
		}
		fmt.Fprintf(&b, "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n  platform = 'linux/%s'\n  snapshotter = %q\n  differ = %q\n", runtime.GOARCH, name, differ)
	}
	if c.opts.Unpacks > 0 {
		fmt.Fprintf(&b, "[plugins.'io.containerd.transfer.v1.local']\n  max_concurrent_unpacks = %d\n", c.opts.Unpacks)
	}
	b.WriteString(c.opts.Extra)
	if c.opts.CRI != nil {
		b.WriteString(c.opts.CRI.config(c.opts.RunDir, c.opts.ConfigVersion))
	}
	return b.String()
}

// Start starts containerd, again after Stop or Kill, with the same directories.
func (c *Containerd) Start(ctx context.Context) error {
	env := []string{"PATH=" + c.opts.Binaries.Dir + ":" + os.Getenv("PATH")}
	p, err := StartProcess("containerd", c.LogPath(), env, c.opts.Binaries.Containerd, "--config", c.configPath())
	if err != nil {
		return err
	}
	c.Process = p
	if err := c.WaitReady(ctx, slow, c.serving); err != nil {
		if c.Running() {
			err = fmt.Errorf("%w\n%s", err, c.stacks())
		}
		return errors.Join(err, c.Kill())
	}
	return nil
}

// stacks is where the threads of a containerd are that hangs, in the kernel and in its
// own code.
func (c *Containerd) stacks() string {
	var b strings.Builder
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", c.PID()))
	for _, dir := range threads {
		wchan, _ := os.ReadFile(filepath.Join(dir, "wchan"))
		stack, _ := os.ReadFile(filepath.Join(dir, "stack"))
		fmt.Fprintf(&b, "--- thread %s: %s\n%s", filepath.Base(dir), wchan, stack)
	}
	// containerd answers SIGUSR1 with its goroutines, in the log.
	if c.cmd.Process.Signal(syscall.SIGUSR1) == nil {
		time.Sleep(2 * time.Second)
	}
	return b.String() + c.LogTail(64<<10)
}

// Restart stops containerd in the orderly way and starts it again.
func (c *Containerd) Restart(ctx context.Context) error {
	if err := c.Stop(); err != nil {
		return err
	}
	return c.Start(ctx)
}

func (c *Containerd) serving(ctx context.Context) error {
	if _, err := os.Stat(c.Address); err != nil {
		return err
	}
	cl, err := c.Client()
	if err != nil {
		return err
	}
	defer cl.Close()
	ok, err := cl.IsServing(ctx)
	if err == nil && !ok {
		err = errors.New("containerd: not serving")
	}
	return err
}

// Client returns a client in the namespace of Ctr.
func (c *Containerd) Client() (*client.Client, error) {
	return client.New(c.Address, client.WithDefaultNamespace(c.Namespace), client.WithTimeout(30*time.Second))
}

// Ctr runs ctr against this containerd and returns its standard output.
//
// What a command in a container prints, ctr can lose on a busy machine (measured: 3 times in
// 250 commands): when it deletes the process it stops reading, also if it has not begun to
// (containerd's client/process.go:258; containerd/fifo's Close). Such a command that has
// printed nothing is run again: what is not there does not come by that.
//
// Each container has a cgroup of its own, and those of each containerd a directory of their
// own for the state of runc, which a boot empties. ctr and the shim name both after the
// namespace and the container (the directory is below /run/containerd/runc), so that two
// containerds with containers of one name would share them: runc refuses the second, or loses
// its state when the first is deleted.
func (c *Containerd) Ctr(ctx context.Context, args ...string) (string, error) {
	argv := []string{c.opts.Binaries.Ctr, "--address", c.Address, "--namespace", c.Namespace}
	argv = append(argv, ownPlaces(args, fmt.Sprintf("/%s/%d", c.Namespace, cgroups.Add(1)), filepath.Join(c.state(), "runc"))...)
	for try := 1; ; try++ {
		out, err := run(ctx, "", []string{"PATH=" + c.opts.Binaries.Dir + ":" + os.Getenv("PATH")}, argv...)
		if err != nil || out != "" || try == 5 || !prints(args) {
			return out, err
		}
	}
}

// cgroups numbers the cgroups of containers that Ctr runs.
var cgroups atomic.Int64

// ownPlaces adds, to a command of ctr that runs a container, the cgroup of the container and the
// directory for the state of runc.
func ownPlaces(args []string, cgroup, runc string) []string {
	run := slices.Index(args, "run")
	if run < 0 {
		return args
	}
	return slices.Insert(slices.Clone(args), run+1, "--cgroup", cgroup, "--runc-root", runc)
}

// prints reports whether a command of ctr runs one in a container and prints its output.
func prints(args []string) bool {
	has := func(arg string) bool { return slices.Contains(args, arg) }
	inside := has("run") && has("--rm") || has("task") && has("exec")
	return inside && !has("write") && !has("--detach") && !has("-d") && !has("--log-uri")
}
