package oracle

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/diff"
	diffproxy "github.com/containerd/containerd/v2/core/diff/proxy"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layers"
	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// Subject is a snapshotter under test that can be started on a root directory.
type Subject interface {
	// Start recovers what is in root and returns the snapshotter. Close of it
	// stops it, in order, and leaves nothing open below root.
	Start(ctx context.Context, root string) (snapshots.Snapshotter, error)
}

// ContentName is the directory beside the root of the snapshotter in which, if
// it is there, containerd's content store is.
const ContentName = "content"

// InProcess is durable-snapshotter as a Go package: the same recovery and the
// same answers as the daemon's, without a process for every state.
type InProcess struct{}

// Start opens the root.
func (InProcess) Start(ctx context.Context, root string) (snapshots.Snapshotter, error) {
	s := &inProcess{}
	var err error
	s.Snapshotter, err = snapshotter.New(quiet(ctx), snapshotter.Config{
		Root: root, ContentRoot: filepath.Join(filepath.Dir(root), ContentName), OnDamaged: s.damaged,
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// inProcess collects what durable-snapshotter reports.
type inProcess struct {
	*snapshotter.Snapshotter
	mu     sync.Mutex // guards noBlob
	noBlob []string
}

func (s *inProcess) damaged(e *layers.DamagedError) {
	if e.NoBlob {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.noBlob = append(s.noBlob, e.Name)
	}
}

// Repair is the daemon's: see repairer.
func (s *inProcess) Repair(ctx context.Context, o layers.RepairOptions) ([]layers.RepairResult, error) {
	return s.Layers().Repair(ctx, o)
}

// NoBlob returns the layers that were reported as without a good blob.
func (s *inProcess) NoBlob() ([]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.noBlob), nil
}

// quiet keeps the log of thousands of recoveries from the output of a test.
func quiet(ctx context.Context) context.Context {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return log.WithLogger(ctx, logrus.NewEntry(l))
}

// Process is any snapshotter that serves the API for proxy plugins on a unix
// socket. It is started for every examination, because only a start recovers.
type Process struct {
	Command []string // {root} and {address} stand for what Start is given, {config} for a file with Config in it
	Config  string   // with {root} for the same; after the line for Content
	Content string   // content_root in that file, "" for none
	Env     []string
	Address string // of the socket
	Log     string // file

	// Roots are directories where the program insists to keep its data. A part of
	// the disk is mounted on each while it runs; they must exist.
	Roots []string
	// Foreign programs may end with any status when they get SIGTERM.
	Foreign bool
}

// Start starts the process and waits until it answers.
func (p Process) Start(ctx context.Context, root string) (snapshots.Snapshotter, error) {
	return p.Launch(ctx, root)
}

// Launch is Start, with the process for its result.
func (p Process) Launch(ctx context.Context, root string) (*Running, error) {
	config := filepath.Join(filepath.Dir(p.Address), "config.toml")
	names := strings.NewReplacer("{root}", root, "{address}", p.Address, "{config}", config)
	argv := make([]string, len(p.Command))
	for i, word := range p.Command {
		argv[i] = names.Replace(word)
	}
	if err := os.MkdirAll(filepath.Dir(p.Address), 0o700); err != nil {
		return nil, err
	}
	if p.Content != "" {
		text := fmt.Sprintf("content_root = %q\n%s", p.Content, p.Config)
		if err := os.WriteFile(config, []byte(names.Replace(text)), 0o600); err != nil {
			return nil, err
		}
	}
	_ = os.Remove(p.Address) // of one that was killed
	r := &Running{program: p}
	if info, err := os.Stat(p.Log); err == nil {
		r.logged = info.Size()
	}
	if err := r.bind(root); err != nil {
		return nil, errors.Join(err, r.unbind())
	}
	process, err := kit.StartProcess(filepath.Base(argv[0]), p.Log, p.Env, argv...)
	if err != nil {
		return nil, errors.Join(err, r.unbind())
	}
	conn, err := grpc.NewClient("unix://"+p.Address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(impatient))
	if err != nil {
		return nil, errors.Join(err, process.Kill(), r.unbind())
	}
	r.Snapshotter = proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "subject")
	r.process, r.conn = process, conn
	if err := process.WaitReady(ctx, 30*time.Second, r.answers); err != nil {
		return nil, errors.Join(err, conn.Close(), process.Kill(), r.unbind())
	}
	return r, nil
}

// bind mounts a part of root on each of the program's own directories.
func (r *Running) bind(root string) error {
	for i, dir := range r.program.Roots {
		part := filepath.Join(root, strconv.Itoa(i))
		if err := os.MkdirAll(part, 0o711); err != nil {
			return err
		}
		if err := unix.Mount(part, dir, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount %s on %s: %w", part, dir, err)
		}
		r.bound = append(r.bound, dir)
	}
	return nil
}

// unbind undoes bind, and waits for a program that was just killed to let go.
func (r *Running) unbind() error {
	deadline := time.Now().Add(30 * time.Second)
	for len(r.bound) > 0 {
		dir := r.bound[len(r.bound)-1]
		err := unix.Unmount(dir, 0)
		if errors.Is(err, unix.EBUSY) && time.Now().Before(deadline) {
			time.Sleep(5 * time.Millisecond)
			continue
		}
		if err != nil {
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
		r.bound = r.bound[:len(r.bound)-1]
	}
	return nil
}

// Running is a started Process.
type Running struct {
	snapshots.Snapshotter
	program Process
	process *kit.Process
	conn    *grpc.ClientConn
	bound   []string // of program.Roots, those that are mounted
	logged  int64    // length of the log before it was started
}

// impatient tries again at once: a socket that is not there yet is there in
// milliseconds, and a process is started for every examination.
var impatient = grpc.ConnectParams{
	Backoff:           backoff.Config{BaseDelay: 2 * time.Millisecond, Multiplier: 1.2, MaxDelay: 20 * time.Millisecond},
	MinConnectTimeout: time.Second,
}

// answers calls Stat of something that is not there, and is content with that answer.
func (r *Running) answers(ctx context.Context) error {
	_, err := r.Stat(namespaces.WithNamespace(ctx, "default"), "not-there")
	if err == nil {
		return errors.New("stat of what is not there: no error")
	}
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// Applier is the diff service on the same socket.
func (r *Running) Applier() diff.Applier {
	return diffproxy.NewDiffApplier(diffapi.NewDiffClient(r.conn)).(diff.Applier)
}

// Cleanup passes the call through, which embedding alone would hide.
func (r *Running) Cleanup(ctx context.Context) error {
	if c, ok := r.Snapshotter.(snapshots.Cleaner); ok {
		return c.Cleanup(ctx)
	}
	return nil
}

// Close stops the process with SIGTERM.
func (r *Running) Close() error {
	stop := r.process.Stop
	if r.program.Foreign {
		stop = func() error {
			_ = r.process.Stop() // its status is its own business
			return r.process.Kill()
		}
	}
	err := errors.Join(r.Snapshotter.Close(), r.conn.Close(), stop(), r.unbind())
	if err != nil {
		err = fmt.Errorf("stop snapshotter: %w", err)
	}
	return err
}

// Kill ends the process with SIGKILL, as a power cut would.
func (r *Running) Kill() error {
	return errors.Join(r.Snapshotter.Close(), r.conn.Close(), r.process.Kill(), r.unbind())
}
