package kittest

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

var binaries = sync.OnceValues(func() (kit.Binaries, error) {
	return kit.Build(context.Background()) // they outlive the test that needs them first
})

// Binaries are the programs under test, built at the first use.
func Binaries(t testing.TB) kit.Binaries {
	t.Helper()
	return Must[kit.Binaries](t)(binaries())
}

// ReleasesVar names releases of containerd that are to be tested instead of the usual ones,
// separated by commas, or "all".
const ReleasesVar = "DURABLE_TEST_CONTAINERD"

// Releases are the quick ones, or those of ReleasesVar.
func Releases(quick ...string) []string {
	switch v := os.Getenv(ReleasesVar); v {
	case "":
		return quick
	case "all":
		return kit.Releases
	default:
		return strings.Split(v, ",")
	}
}

// Release is Binaries with the programs of a release of containerd.
func Release(t testing.TB, release string) kit.Binaries {
	t.Helper()
	return Must[kit.Binaries](t)(Binaries(t).Release(t.Context(), release))
}

// Scratch is a directory that is removed after the test. Its name is short: the
// path of a unix socket has room for 107 bytes, and t.TempDir spells out the
// test's whole name.
func Scratch(t testing.TB) string {
	t.Helper()
	dir := Must[string](t)(os.MkdirTemp("", "t"))
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// NewDisk makes a disk, with ext4 unless o has another one, and closes it after
// the test: one that cannot be unmounted, because something was left behind,
// fails the test.
func NewDisk(t testing.TB, o kit.DiskOptions) *kit.Disk {
	t.Helper()
	if o.FS == "" {
		o.FS = "ext4"
	}
	d := Must[*kit.Disk](t)(kit.NewDisk(filepath.Join(Scratch(t), "disk"), o))
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// StartDaemon starts the daemon, the one of Binaries with a RunDir of its own
// unless o has another one, and stops it in the orderly way after the test.
func StartDaemon(t testing.TB, o kit.DaemonOptions) *kit.Daemon {
	t.Helper()
	if o.Binary == "" {
		o.Binary = Binaries(t).Daemon
	}
	if o.RunDir == "" {
		o.RunDir = Scratch(t)
	}
	d := Must[*kit.Daemon](t)(kit.StartDaemon(t.Context(), o))
	t.Cleanup(func() { Stop(t, d.Process) })
	return d
}

// Stop stops a process in the orderly way, and shows the end of its log if the
// test has failed. One that does not run any more is left alone.
func Stop(t testing.TB, p *kit.Process) {
	t.Helper()
	if t.Failed() {
		t.Log(p.LogTail(6000))
	}
	if !p.Running() {
		return
	}
	if err := p.Stop(); err != nil {
		t.Error(err)
	}
}
