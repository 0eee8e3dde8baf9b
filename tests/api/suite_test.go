package api

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// suiteVar is set in the process that runs containerd's suite itself.
const suiteVar = "DURABLE_TEST_SUITE"

// suiteSize is the number of tests in the suite of containerd 2.4.2. It is here
// so that an upgrade, or a filter that is added, cannot shrink it unseen.
const suiteSize = 21

// TestSuite runs containerd's own conformance suite against the daemon over
// gRPC. It does so in a process of its own, because only its output shows
// whether a test of the suite was skipped.
func TestSuite(t *testing.T) {
	if os.Getenv(suiteVar) != "" {
		// Under any name but a few, the suite renames directories of a lower
		// layer, which overlayfs answers with EXDEV by design.
		testsuite.SnapshotterSuite(t, "overlayfs", suiteSnapshotter(kittest.Binaries(t).Daemon))
		return
	}
	disk := newDisk(t, kit.DiskOptions{})
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestSuite$", "-test.v", "-test.timeout=0") // it ends with this one
	cmd.Env = append(os.Environ(), suiteVar+"=1", "TMPDIR="+disk.Path())
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("containerd's suite: %v\n%s", err, out)
	}
	passed := regexp.MustCompile(`(?m)^    --- PASS: TestSuite/`).FindAll(out, -1)
	skipped := regexp.MustCompile(`(?m)^ *--- SKIP: .*`).FindAllString(string(out), -1)
	if len(passed) != suiteSize || len(skipped) != 0 {
		t.Errorf("%d of %d tests passed, skipped: %q", len(passed), suiteSize, skipped)
	}
}

// suiteSnapshotter returns what starts a daemon of its own for one test of the
// suite.
func suiteSnapshotter(binary string) testsuite.SnapshotterFunc {
	return func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		d, err := kit.StartDaemon(ctx, kit.DaemonOptions{
			Binary: binary, Dir: filepath.Dir(root), RunDir: filepath.Join(filepath.Dir(root), "run"),
		})
		if err != nil {
			return nil, nil, err
		}
		sn, err := d.Snapshotter()
		if err != nil {
			return nil, nil, errors.Join(err, d.Kill())
		}
		return sn, func() error { return errors.Join(sn.Close(), d.Stop()) }, nil
	}
}
