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
	// suiteVar names a run of tests. While its value stays the same, what was compiled
	// is up to date: make test sets it for its many processes.
	suiteVar = "DURABLE_KIT_SUITE"
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
	tests, bin, unlock, err := binDir(programs)
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
	tests, bin, unlock, err := binDir(programs)
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
	tests, bin, unlock, err := binDir(programs)
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

// built has the builds of this process. What is compiled does not change while a test
// runs, and to find that out takes the go command seconds.
var built sync.Map

// goBuild compiles into out, a file or a directory with a slash at its end, unless this
// process has done so, or another one of the same run of tests, see suiteVar.
func goBuild(ctx context.Context, dir, out string, args ...string) error {
	id := []string{os.Getenv(suiteVar), dir, out}
	for i, arg := range args {
		if i > 0 && args[i-1] == "-overlay" {
			arg = "" // a path of its own each time, with the same in it
		}
		id = append(id, arg)
	}
	key := strings.Join(id, "\x00")
	if _, done := built.Load(key); done {
		return nil
	}
	stamp := filepath.Join(filepath.Dir(out), ".built-"+filepath.Base(out))
	if last, err := os.ReadFile(stamp); err == nil && string(last) == key && id[0] != "" {
		if _, err := os.Stat(out); err == nil {
			return nil
		}
	}
	// -buildvcs=false: git refuses to answer root about a checkout that another
	// user owns, and the build would fail with it.
	argv := append([]string{"go", "build", "-trimpath", "-buildvcs=false", "-o", out}, args...)
	if _, err := run(ctx, dir, []string{"CGO_ENABLED=0"}, argv...); err != nil {
		return err
	}
	built.Store(key, true)
	return os.WriteFile(stamp, []byte(key), 0o644)
}

// programs are what nearly every test needs, and takes seconds once the compiler has
// been at work. What takes minutes has a lock of its own in binDir.
const programs = "programs"

// binDir finds the module of the tests and the directory for the binaries, and
// locks what of the latter: go test runs packages side by side, and a binary that is
// replaced while another process starts it fails with "text file busy".
func binDir(what string) (tests, bin string, unlock func(), err error) {
	if tests, err = Module(); err != nil {
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
func Module() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("find the tests module: %w", err)
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil || dir == "/" {
			break
		}
	}
	if filepath.Base(dir) != "tests" {
		dir = filepath.Join(dir, "tests")
	}
	if _, err := os.Stat(filepath.Join(dir, "go.mod")); err != nil {
		return "", fmt.Errorf("find the tests module: %w", err)
	}
	return dir, nil
}
