package commit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/defects"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

func TestMain(m *testing.M) {
	disk.Init()
	kit.Parallel(3)
	os.Exit(kit.Main(m.Run))
}

// Variants of the daemon, each built at its first use.
var (
	// faulty has the kill points.
	faulty = sync.OnceValues(func() (string, error) {
		return kit.BuildDaemon(context.Background(), "durable-snapshotter-faults", "-tags", "faults")
	})
	// defective has the planted defects, too.
	defective = defects.Build
)

var (
	check   = kittest.Check
	waitFor = kittest.WaitFor
	newDisk = kittest.NewDisk
)

func must[T any](t testing.TB) func(T, error) T { return kittest.Must[T](t) }

// mounts is what Prepare and View return; must needs a name for it.
type mounts = []mount.Mount

// newDaemon prepares a daemon whose process, if there is one, ends with the
// test. Socket and log lie outside the disk under test.
func newDaemon(t *testing.T, o kit.DaemonOptions) *kit.Daemon {
	t.Helper()
	if o.Binary == "" {
		o.Binary = kittest.Binaries(t).Daemon
	}
	if o.RunDir == "" {
		o.RunDir = kittest.Scratch(t)
	}
	d := must[*kit.Daemon](t)(kit.NewDaemon(o))
	t.Cleanup(func() { kill(t, d) })
	t.Cleanup(func() {
		if t.Failed() && d.Process != nil {
			t.Log(d.LogTail(6000))
		}
	})
	return d
}

// kill ends the daemon as the kernel's OOM killer would. One that has ended, or
// never ran, is left alone.
func kill(t *testing.T, d *kit.Daemon) {
	t.Helper()
	if d.Process == nil {
		return
	}
	if err := d.Kill(); err != nil {
		t.Error(err)
	}
}

// start starts the daemon and connects to it.
func start(t *testing.T, d *kit.Daemon) snapshots.Snapshotter {
	t.Helper()
	check(t, d.Start(t.Context()))
	return kittest.Connect(t, d)
}

func cleanUp(t *testing.T, sn snapshots.Snapshotter) {
	t.Helper()
	check(t, sn.(snapshots.Cleaner).Cleanup(t.Context()))
}

// program runs a verb of the binary under test on the daemon's root and returns
// its standard output. The error holds its standard error.
func program(t *testing.T, d *kit.Daemon, args ...string) (string, error) {
	t.Helper()
	stdout, stderr, status, err := d.Verb(t.Context(), args...)
	if err == nil && status != 0 {
		err = fmt.Errorf("%s: status %d: %s", strings.Join(args, " "), status, stderr)
	}
	return stdout, err
}

// noOrphans is I5 after a Cleanup, with nobody else at work.
func noOrphans(t *testing.T, d *kit.Daemon) {
	t.Helper()
	if err := orphans(t, d); err != nil {
		t.Error(err)
	}
}

// orphans looks for a directory without a row, a row without a directory, and
// for what waits to be deleted.
func orphans(t *testing.T, d *kit.Daemon) error {
	t.Helper()
	rows, wrong := map[string]string{}, []error(nil)
	for _, s := range kittest.Inspect(t, d).Snapshots {
		rows[fmt.Sprint(s.ID)] = s.Name
	}
	for _, name := range list(t, d.Root, "snapshots") {
		if _, ok := rows[name]; !ok {
			wrong = append(wrong, fmt.Errorf("I5: snapshots/%s has no row", name))
		}
		delete(rows, name)
	}
	for id, name := range rows {
		wrong = append(wrong, fmt.Errorf("I5: the directory %s of %q is missing", id, name))
	}
	for _, name := range list(t, d.Root, "removing") {
		wrong = append(wrong, fmt.Errorf("I5: removing/%s is still there", name))
	}
	return errors.Join(wrong...)
}

// list returns the names in a directory.
func list(t *testing.T, elem ...string) []string {
	t.Helper()
	var names []string
	for _, e := range must[[]os.DirEntry](t)(os.ReadDir(filepath.Join(elem...))) {
		names = append(names, e.Name())
	}
	return names
}

// upper returns the directory that an extraction writes to: containerd applies
// a layer there directly, not through the mount (core/diff/apply/apply_linux.go).
func upper(t *testing.T, m mounts) string {
	t.Helper()
	dir, err := upperOf(m)
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func upperOf(m mounts) (string, error) {
	if len(m) == 1 {
		if m[0].Type == "bind" {
			return m[0].Source, nil
		}
		for _, o := range m[0].Options {
			if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
				return dir, nil
			}
		}
	}
	return "", fmt.Errorf("mounts without an upper directory: %v", m)
}
