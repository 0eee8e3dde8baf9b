package kittest

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// Connect connects a client to a daemon, until the test ends: one that had a
// connection to an earlier process would first wait out grpc's backoff.
func Connect(t testing.TB, d *kit.Daemon) snapshots.Snapshotter {
	t.Helper()
	sn := Must[snapshots.Snapshotter](t)(d.Snapshotter())
	t.Cleanup(func() {
		if err := sn.Close(); err != nil {
			t.Error(err)
		}
	})
	return sn
}

// MakeLayer commits a layer with one file in it.
func MakeLayer(t testing.TB, d *kit.Daemon, name string) {
	t.Helper()
	sn := Connect(t, d)
	mounts := Must[[]mount.Mount](t)(sn.Prepare(t.Context(), name+"-key", ""))
	Check(t, mount.WithTempMount(t.Context(), mounts, func(root string) error {
		return os.WriteFile(filepath.Join(root, "file"), []byte(name), 0o644)
	}))
	Check(t, sn.Commit(t.Context(), name, name+"-key"))
}

// Verb runs a verb of the daemon's program beside it, and ends the test when the
// verb does not end by itself.
func Verb(t testing.TB, d *kit.Daemon, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	stdout, stderr, status, err := d.Verb(t.Context(), args...)
	Check(t, err)
	return stdout, stderr, status
}

// Inspect reads what the daemon has on record, running or not.
func Inspect(t testing.TB, d *kit.Daemon) kit.Report {
	t.Helper()
	return Must[kit.Report](t)(d.Inspect(t.Context()))
}
