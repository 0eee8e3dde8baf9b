package kit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// binVar names a directory for the binaries; tests/.bin when unset.
	binVar = "DURABLE_KIT_BIN"
	// daemonVar names a durable-snapshotter that exists already, to test a
	// released binary or one built with the race detector.
	daemonVar = "DURABLE_KIT_DAEMON"
)

// Binaries are the programs of one containerd, and the daemon under test.
type Binaries struct {
	Dir        string // what containerd needs on its PATH to find the shim
	Containerd string
	Ctr        string
	Daemon     string
}

// Build compiles containerd, ctr and the runc shim at the version tests/go.mod
// requires, and the daemon from the tree. Go's build cache makes all but the
// first call cheap.
func Build(ctx context.Context) (Binaries, error) {
	tests, bin, unlock, err := binDir(ctx, programs)
	if err != nil {
		return Binaries{}, err
	}
	defer unlock()
	b := Binaries{
		Dir:        bin,
		Containerd: filepath.Join(bin, "containerd"),
		Ctr:        filepath.Join(bin, "ctr"),
		Daemon:     filepath.Join(bin, "durable-snapshotter"),
	}
	const module = "github.com/containerd/containerd/v2/cmd/"
	// no_btrfs drops containerd's btrfs snapshotter, its only part that needs
	// cgo and C headers; the overlayfs snapshotter works on btrfs without it.
	err = goBuild(ctx, tests, bin+"/", "-tags", "no_btrfs", module+"containerd", module+"ctr", module+"containerd-shim-runc-v2")
	if err != nil {
		return Binaries{}, fmt.Errorf("build containerd: %w", err)
	}
	if daemon := os.Getenv(daemonVar); daemon != "" {
		b.Daemon = daemon
		return b, nil
	}
	if err := goBuild(ctx, filepath.Dir(tests), b.Daemon, "./cmd/durable-snapshotter"); err != nil {
		return Binaries{}, fmt.Errorf("build durable-snapshotter: %w", err)
	}
	return b, nil
}

// BuildDaemon compiles a variant of the daemon, such as one with a build tag,
// under another name beside the standard one and returns its path.
func BuildDaemon(ctx context.Context, name string, flags ...string) (string, error) {
	tests, bin, unlock, err := binDir(ctx, programs)
	if err != nil {
		return "", err
	}
	defer unlock()
	path := filepath.Join(bin, name)
	if err := goBuild(ctx, filepath.Dir(tests), path, append(flags, "./cmd/durable-snapshotter")...); err != nil {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	return path, nil
}

// BuildTool compiles a program of the tests module, named by its directory there,
// without symbols, and returns its path.
func BuildTool(ctx context.Context, dir string) (string, error) {
	tests, bin, unlock, err := binDir(ctx, programs)
	if err != nil {
		return "", err
	}
	defer unlock()
	path := filepath.Join(bin, filepath.Base(dir))
	if err := goBuild(ctx, tests, path, "-ldflags=-s -w", "./"+dir); err != nil {
		return "", fmt.Errorf("build %s: %w", dir, err)
	}
	return path, nil
}

// built has the builds of this process, as their arguments. What is compiled does not
// change while a test runs, and to find that out takes the go command a second.
var built sync.Map

func goBuild(ctx context.Context, dir, out string, args ...string) error {
	id := strings.Join(append([]string{dir, out}, args...), "\x00")
	if _, done := built.Load(id); done {
		return nil
	}
	// -buildvcs=false: git refuses to answer root about a checkout that another
	// user owns, and the build would fail with it.
	argv := append([]string{"go", "build", "-trimpath", "-buildvcs=false", "-o", out}, args...)
	_, err := run(ctx, dir, []string{"CGO_ENABLED=0"}, argv...)
	if err == nil {
		built.Store(id, true)
	}
	return err
}

// programs are what nearly every test needs, and takes seconds once the compiler has
// been at work. What takes minutes has a lock of its own in binDir.
const programs = "programs"

// binDir finds the module of the tests and the directory for the binaries, and
// locks what of the latter: go test runs packages side by side, and a binary that is
// replaced while another process starts it fails with "text file busy".
func binDir(ctx context.Context, what string) (tests, bin string, unlock func(), err error) {
	if tests, err = Module(ctx); err != nil {
		return "", "", nil, err
	}
	if bin = os.Getenv(binVar); bin == "" {
		bin = filepath.Join(tests, ".bin")
	}
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return "", "", nil, fmt.Errorf("build: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(bin, ".lock-"+what), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return "", "", nil, fmt.Errorf("build: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return "", "", nil, errors.Join(fmt.Errorf("build: lock %s: %w", f.Name(), err), f.Close())
	}
	return tests, bin, func() { f.Close() }, nil
}

// Module returns the directory of the tests module, from any directory of
// either module.
func Module(ctx context.Context) (string, error) {
	out, err := run(ctx, "", nil, "go", "env", "GOMOD")
	if err != nil {
		return "", err
	}
	dir := filepath.Dir(strings.TrimSpace(out))
	if filepath.Base(dir) != "tests" {
		dir = filepath.Join(dir, "tests")
	}
	if _, err := os.Stat(filepath.Join(dir, "go.mod")); err != nil {
		return "", fmt.Errorf("find the tests module: %w", err)
	}
	return dir, nil
}
