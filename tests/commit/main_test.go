package commit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

func TestMain(m *testing.M) {
	disk.Init()
	os.Exit(kit.Main(m.Run))
}

// faulty is the daemon with faults that a test can ask for, built at the first use.
var faulty = sync.OnceValues(func() (string, error) {
	return kit.BuildDaemon(context.Background(), "durable-snapshotter-faults", "-tags", "faults")
})

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
	return connect(t, d)
}

// connect opens a client of its own: one that had a connection to an earlier
// process would first wait out grpc's backoff.
func connect(t *testing.T, d *kit.Daemon) snapshots.Snapshotter {
	t.Helper()
	sn := must[snapshots.Snapshotter](t)(d.Snapshotter())
	t.Cleanup(func() { sn.Close() })
	return sn
}

func cleanUp(t *testing.T, sn snapshots.Snapshotter) {
	t.Helper()
	check(t, sn.(snapshots.Cleaner).Cleanup(t.Context()))
}

// program runs a verb of the binary under test on the daemon's root and returns
// its standard output. The error holds its standard error.
func program(t *testing.T, d *kit.Daemon, args ...string) (string, error) {
	t.Helper()
	argv := append(args, "--config", filepath.Join(filepath.Dir(d.LogPath()), "config.toml"), "--root", d.Root, "--address", d.Address)
	cmd := exec.CommandContext(t.Context(), kittest.Binaries(t).Daemon, argv...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, stderr.Bytes())
	}
	return stdout.String(), nil
}

// report is the part of inspect --json that the tests read.
type report struct {
	Snapshots []row `json:"snapshots"`
	Journal   struct {
		Open      []openEntry   `json:"open"`
		Committed []commitEntry `json:"committed"`
		History   []commitEntry `json:"history"`
	} `json:"journal"`
}

type row struct {
	ID     uint64 `json:"id"`
	Kind   string `json:"kind"`
	Name   string `json:"name"`
	Parent string `json:"parent"`
}

type openEntry struct {
	ID         uint64    `json:"id"`
	Key        string    `json:"key"`
	Extraction bool      `json:"extraction"`
	Abandoned  time.Time `json:"abandoned"`
	Poisoned   string    `json:"poisoned"`
	CursorLost bool      `json:"cursor_lost"`
}

type commitEntry struct {
	Sequence uint64 `json:"sequence"`
	ID       uint64 `json:"id"`
	Name     string `json:"name"`
	Strategy string `json:"strategy"`
}

// inspect asks a running or a stopped daemon what it has on record.
func inspect(t *testing.T, d *kit.Daemon) report {
	t.Helper()
	return must[report](t)(tryInspect(t, d))
}

func tryInspect(t *testing.T, d *kit.Daemon) (r report, err error) {
	t.Helper()
	out, err := program(t, d, "inspect", "--json")
	if err != nil {
		return r, err
	}
	return r, json.Unmarshal([]byte(out), &r)
}

// find returns the row of a key or a name.
func (r report) find(name string) (row, bool) {
	for _, s := range r.Snapshots {
		if s.Name == name {
			return s, true
		}
	}
	return row{}, false
}

// layerDir is where the content of a snapshot lies.
func layerDir(d *kit.Daemon, id uint64) string {
	return filepath.Join(d.Root, "snapshots", fmt.Sprint(id), "fs")
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
	for _, s := range inspect(t, d).Snapshots {
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
