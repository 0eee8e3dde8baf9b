package kit

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// DaemonOptions describe one durable-snapshotter.
type DaemonOptions struct {
	Binary string
	Dir    string // on the disk under test; holds the root directory
	RunDir string // holds socket, config and log; Dir when empty
	Config string // text of the configuration file
	// LogLevel is debug unless set.
	LogLevel string
	// ContentRoot and Containerd are the content store and the socket of the
	// containerd that the daemon serves. Without them it heals from nothing of
	// these tests, and notifies no containerd.
	ContentRoot, Containerd string
	Wrapper                 []string // argv to put in front, such as strace and its flags
	Env                     []string // added to the daemon's environment
	VerbEnv                 []string // added to that of the verbs

	// Sockets are passed to each start as systemd passes those of a socket unit: they are
	// there before the daemon, and outlive it.
	Sockets []*os.File
}

// Daemon is a running durable-snapshotter. Stop or Kill it, then Start it again:
// root and address stay the same.
type Daemon struct {
	*Process
	Root    string
	Address string
	opts    DaemonOptions
}

// NewDaemon prepares the directories and the configuration file without
// starting anything.
func NewDaemon(opts DaemonOptions) (*Daemon, error) {
	if opts.RunDir == "" {
		opts.RunDir = opts.Dir
	}
	d := &Daemon{
		Root:    filepath.Join(opts.Dir, "root"),
		Address: filepath.Join(opts.RunDir, "durable.sock"),
		opts:    opts,
	}
	for _, dir := range []string{opts.Dir, opts.RunDir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("daemon: %w", err)
		}
	}
	if err := os.WriteFile(d.configPath(), []byte(opts.config()), 0o644); err != nil {
		return nil, fmt.Errorf("daemon: %w", err)
	}
	return d, nil
}

// config is the text of the configuration file. A containerd that happens to
// run on this machine is none of the tests' business, and what a test sees of drops is not
// to depend on whether its registry is up.
func (o DaemonOptions) config() string {
	text := o.Config
	if o.ContentRoot != "" {
		text = fmt.Sprintf("content_root = '%s'\n%s", o.ContentRoot, text)
	}
	if !strings.Contains(text, "[containerd]") {
		text += fmt.Sprintf("\n[containerd]\naddress = '%s'\n", o.Containerd)
	}
	if !strings.Contains(text, "[heal]") {
		text += "\n[heal]\nregistry = false\n"
	}
	return text
}

// Use makes the next start one of another program, unless binary is empty, with
// nothing but env added to the environment.
func (d *Daemon) Use(binary string, env ...string) {
	d.opts.Binary, d.opts.Env = cmp.Or(binary, d.opts.Binary), env
}

// Configure writes another configuration, for the next start.
func (d *Daemon) Configure(config string) error {
	d.opts.Config = config
	return os.WriteFile(d.configPath(), []byte(d.opts.config()), 0o644)
}

// StartDaemon is NewDaemon and Start.
func StartDaemon(ctx context.Context, opts DaemonOptions) (*Daemon, error) {
	d, err := NewDaemon(opts)
	if err != nil {
		return nil, err
	}
	return d, d.Start(ctx)
}

func (d *Daemon) configPath() string { return filepath.Join(d.opts.RunDir, "config.toml") }

// LogPath is the file all starts of this daemon log to.
func (d *Daemon) LogPath() string { return filepath.Join(d.opts.RunDir, "durable-snapshotter.log") }

// Argv is the command line Start runs.
func (d *Daemon) Argv() []string {
	return append(append([]string(nil), d.opts.Wrapper...), d.opts.Binary, "serve",
		"--config", d.configPath(), "--root", d.Root, "--address", d.Address, "--log-level", cmp.Or(d.opts.LogLevel, "debug"))
}

// Launch starts the daemon and does not wait for it, for tests in which it must
// refuse to serve.
func (d *Daemon) Launch() (err error) {
	argv := d.Argv()
	if n := len(d.opts.Sockets); n > 0 {
		// LISTEN_PID is that of the daemon (sd_listen_fds(3)), which takes the place of the shell.
		argv = append([]string{"/bin/sh", "-c", fmt.Sprintf(`LISTEN_PID=$$ LISTEN_FDS=%d exec "$@"`, n), "sh"}, argv...)
	}
	d.Process, err = startProcess("durable-snapshotter", d.LogPath(), d.opts.Env, d.opts.Sockets, argv...)
	return err
}

// Start starts the daemon and waits until it reports itself healthy.
func (d *Daemon) Start(ctx context.Context) error {
	if err := d.Launch(); err != nil {
		return err
	}
	if err := d.WaitReady(ctx, slow, d.Healthy); err != nil {
		return errors.Join(err, d.Kill())
	}
	return nil
}

// Restart stops the daemon in the orderly way and starts it again.
func (d *Daemon) Restart(ctx context.Context) error {
	if err := d.Stop(); err != nil {
		return err
	}
	return d.Start(ctx)
}

// Dial connects to the daemon's socket.
func (d *Daemon) Dial() (*grpc.ClientConn, error) { return dial(d.Address) }

func dial(address string) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient("unix://"+address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		// One message must hold a key of a megabyte and more: the refusal of such
		// a key is under test, not grpc's own limit.
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20), grpc.MaxCallSendMsgSize(64<<20)))
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", address, err)
	}
	return conn, nil
}

// Healthy queries the daemon's health service and is nil when the answer is SERVING.
func (d *Daemon) Healthy(ctx context.Context) error {
	conn, err := d.Dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	resp, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		return fmt.Errorf("health of %s: %w", d.Address, err)
	}
	if resp.Status != grpc_health_v1.HealthCheckResponse_SERVING {
		return fmt.Errorf("health of %s: %v", d.Address, resp.Status)
	}
	return nil
}

// Snapshotter returns the client containerd itself uses for a proxied
// snapshotter. Closing it closes its connection.
func (d *Daemon) Snapshotter() (snapshots.Snapshotter, error) { return connect(d.Address, "durable") }

func connect(address, name string) (snapshots.Snapshotter, error) {
	conn, err := dial(address)
	if err != nil {
		return nil, err
	}
	sn := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), name)
	return &ownedSnapshotter{Snapshotter: sn, close: sync.OnceValue(func() error {
		return errors.Join(sn.Close(), conn.Close())
	})}, nil
}

// ownedSnapshotter closes the connection that the proxy client leaves open. It
// passes Cleanup through, which embedding the interface alone would hide.
type ownedSnapshotter struct {
	snapshots.Snapshotter
	close func() error // once: a snapshotter may be closed twice, a connection not
}

func (s *ownedSnapshotter) Cleanup(ctx context.Context) error {
	return s.Snapshotter.(snapshots.Cleaner).Cleanup(ctx)
}

func (s *ownedSnapshotter) Close() error { return s.close() }
