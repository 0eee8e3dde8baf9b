package commit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// library is a node with images and a running container, whose daemon is
// stopped.
type library struct {
	*node
	runnable, layered kit.Pushed // the second one has a layer more than the first
	kinds             kit.Pushed // nothing in it runs
	snapshots         string     // as inspect printed them
}

const running = "running" // the container

func newLibrary(t *testing.T) *library {
	t.Helper()
	d := newDisk(t, kit.DiskOptions{FS: "ext4", Size: 1 << 30})
	l := &library{node: newNode(t, d.Path("durable"))}
	runnable := must[kit.Image](t)(kit.Runnable(t.Context()))
	l.runnable = l.push(t, "runnable", runnable)
	runnable.Layers = append(slices.Clone(runnable.Layers), kit.NewLayer(kit.Zstd, kit.File("more", 0o644, strings.Repeat("more ", 5000))))
	l.layered = l.push(t, "layered", runnable)
	l.kinds = l.push(t, "kinds", kit.AllKinds())

	start(t, l.next(t, ""))
	for _, p := range []kit.Pushed{l.runnable, l.layered, l.kinds} {
		check(t, unavailable(t, nil, func() error { return l.pull(t.Context(), "durable", p) }))
	}
	l.ctr(t, "run", "-d", "--snapshotter", "durable", l.runnable.Ref, running, "/bin/guest", "wait")
	t.Cleanup(func() { l.ctr(t, "task", "rm", "--force", running) })
	kittest.Exec(t, l.Node, running, "write", "/tmp/note", "of the running container")
	must[mounts](t)(l.client.SnapshotService("durable").View(t.Context(), "a view", l.layered.Top(),
		snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "of the test"})))
	l.snapshots = l.rows(t)
	check(t, l.Daemon.Stop())
	return l
}

func (l *library) ctr(t *testing.T, args ...string) string {
	t.Helper()
	// Not the test's context: a clean-up calls it too.
	out, err := l.Containerd.Ctr(context.WithoutCancel(t.Context()), args...)
	if err != nil {
		t.Error(err)
	}
	return out
}

// times are those of the transaction in a row, and of the moment before the sync
// in a layer's record: some milliseconds lie between them.
var times = regexp.MustCompile(`(?m)^ *"(created|updated)": .*\n`)

// rows is what inspect prints of the snapshots: numbers, names, parents, sizes and
// labels.
func (l *library) rows(t *testing.T) string {
	t.Helper()
	var r struct {
		Snapshots json.RawMessage `json:"snapshots"`
	}
	check(t, json.Unmarshal([]byte(must[string](t)(program(t, l.Daemon, "inspect", "--json"))), &r))
	return times.ReplaceAllString(string(r.Snapshots), "")
}

func (l *library) database() string { return filepath.Join(l.Daemon.Root, "metadata.db") }

// refuses starts the daemon, which must print what is wrong with which file and
// what can be done, and leave everything as it is.
func (l *library) refuses(t *testing.T) {
	t.Helper()
	fingerprint := func() kit.Tree {
		tree := must[kit.Tree](t)(kit.Fingerprint(l.Daemon.Root))
		tree.Untime(".") // a probe of the file system comes and goes
		return tree
	}
	before := fingerprint()
	check(t, l.Daemon.Launch())
	code, err := l.Daemon.Wait(2 * time.Minute)
	if err != nil || code != 1 {
		t.Errorf("serve: code %d, %v, want 1", code, err)
	}
	for _, want := range []string{l.database(), "repair --rebuild"} {
		if log := l.Daemon.LogTail(2000); !strings.Contains(log, want) {
			t.Errorf("serve does not print %s: %s", want, log)
		}
	}
	if d := kit.Diff(before, fingerprint(), 5); d != "" {
		t.Errorf("serve changed the root:\n%s", d)
	}
}

// works checks that everything is there as if nothing had happened.
func (l *library) works(t *testing.T) {
	t.Helper()
	start(t, l.Daemon)
	l.connected(t)
	if err := l.asBefore(t); err != nil {
		t.Error(err)
	}
	for i, p := range []kit.Pushed{l.runnable, l.layered} {
		if out := l.ctr(t, "run", "--rm", "--snapshotter", "durable", p.Ref, fmt.Sprint("once-", i)); out != "hello from the image\n" {
			t.Errorf("%s printed %q", p.Ref, out)
		}
	}
	for _, p := range []kit.Pushed{l.runnable, l.layered, l.kinds} {
		l.whole(t, p, l.recorded(t))
	}
	if out := kittest.Exec(t, l.Node, running, "cat", "/tmp/note"); out != "of the running container" {
		t.Errorf("the running container has %q in its file", out)
	}
	// Collect what the containers have left, which containerd does some time.
	l.ctr(t, "content", "prune", "references")
	waitFor(t, 20*time.Second, func() error { return errors.Join(l.asBefore(t), orphans(t, l.Daemon)) })
	check(t, l.Daemon.Stop())
}

func (l *library) asBefore(t *testing.T) error {
	t.Helper()
	if d := diffLines(strings.Split(l.snapshots, "\n"), strings.Split(l.rows(t), "\n")); d != "" {
		return fmt.Errorf("the snapshots are not what they were: %s", d)
	}
	return nil
}

// TestRebuild loses metadata.db under images and a running container, in two
// ways, and has it rebuilt from the records of the layers themselves.
func TestRebuild(t *testing.T) {
	l := newLibrary(t)
	t.Run("lost", func(t *testing.T) {
		check(t, os.Remove(l.database()))
		l.refuses(t)
		out := must[string](t)(program(t, l.Daemon, "repair", "--rebuild"))
		if strings.Contains(out, "set aside") || strings.Contains(out, "kept") {
			t.Errorf("repair found something wrong: %s", out)
		}
		l.works(t)
	})
	t.Run("garbage", func(t *testing.T) {
		garbage := must[[]byte](t)(os.ReadFile(l.database()))
		noise := rand.NewChaCha8([32]byte{})
		noise.Read(garbage)
		check(t, os.WriteFile(l.database(), garbage, 0o600))
		l.refuses(t)
		out := must[string](t)(program(t, l.Daemon, "repair", "--rebuild"))
		_, kept, _ := strings.Cut(out, "kept: ")
		kept, _, _ = strings.Cut(kept, "\n")
		if now, err := os.ReadFile(kept); err != nil || !bytes.Equal(now, garbage) || filepath.Dir(kept) != l.Daemon.Root {
			t.Errorf("the old file is not what it was: %v; repair printed %s", err, out)
		}
		l.works(t)
	})
	t.Run("intact", func(t *testing.T) {
		before := must[[]byte](t)(os.ReadFile(l.database()))
		if out, err := program(t, l.Daemon, "repair", "--rebuild"); err == nil || !strings.Contains(err.Error(), "whole") {
			t.Errorf("repair of a database that is whole: %v, %s", err, out)
		}
		if now := must[[]byte](t)(os.ReadFile(l.database())); !bytes.Equal(now, before) {
			t.Error("repair changed a database that is whole")
		}
	})
	t.Run("served", func(t *testing.T) {
		start(t, l.Daemon)
		if out, err := program(t, l.Daemon, "repair", "--rebuild"); err == nil || !strings.Contains(err.Error(), "in use") {
			t.Errorf("repair under a running daemon: %v, %s", err, out)
		}
		check(t, l.Daemon.Stop())
	})
	t.Run("damaged layer", func(t *testing.T) { l.damagedLayer(t) })
}

// damagedLayer truncates a file of a layer: the layer and what stands on it is
// set aside, with its name; everything else is restored.
func (l *library) damagedLayer(t *testing.T) {
	name := l.recorded(t)[l.layered.Top()]
	row, ok := kittest.Inspect(t, l.Daemon).Find(name)
	if !ok {
		t.Fatalf("no row of %s", name)
	}
	dir := l.Daemon.SnapshotDir(row.ID)
	check(t, os.Truncate(filepath.Join(dir, "fs/more"), 100))
	check(t, os.Remove(l.database()))
	var r struct {
		Committed int `json:"committed"`
		SetAside  []struct{ Directory, Name, Reason string }
	}
	out := must[string](t)(program(t, l.Daemon, "repair", "--rebuild", "--json"))
	check(t, json.Unmarshal([]byte(strings.Replace(out, "set_aside", "SetAside", 1)), &r))
	if want := len(l.runnable.Layers) + len(l.kinds.Layers); r.Committed != want {
		t.Errorf("%d committed layers were restored, want %d", r.Committed, want)
	}
	var aside []string
	for _, s := range r.SetAside {
		aside = append(aside, s.Name)
		if _, err := os.Stat(filepath.Join(s.Directory, "fs")); err != nil {
			t.Errorf("%s is not where repair reports: %v", s.Name, err)
		}
		if s.Name == name && !strings.Contains(s.Reason, "not whole") {
			t.Errorf("%s was set aside because %s", s.Name, s.Reason)
		}
	}
	if len(aside) != 2 || !slices.Contains(aside, name) {
		t.Errorf("set aside: %v, want %s and the view of it", aside, name)
	}

	sn := start(t, l.Daemon)
	l.connected(t)
	if _, err := sn.Stat(t.Context(), name); err == nil {
		t.Errorf("I2: %s is reported as there", name)
	}
	if info, err := sn.Stat(t.Context(), row.Parent); err != nil || info.Kind != snapshots.KindCommitted {
		t.Errorf("stat of its parent: %v, %v", info.Kind, err)
	}
	if out := l.ctr(t, "run", "--rm", "--snapshotter", "durable", l.runnable.Ref, "after"); out != "hello from the image\n" {
		t.Errorf("%s printed %q", l.runnable.Ref, out)
	}
	l.whole(t, l.kinds, l.recorded(t))
	check(t, l.Daemon.Stop())
}

// TestInspectAgrees queries a live daemon and reads the file of a stopped one.
func TestInspectAgrees(t *testing.T) {
	disk := newDisk(t, kit.DiskOptions{FS: "ext4", Size: 256 << 20})
	d := newDaemon(t, kit.DaemonOptions{Dir: disk.Path("durable")})
	sn, ctx := start(t, d), t.Context()
	links := chain(layers, "first")
	for _, l := range links[:2] {
		check(t, l.unpack(ctx, sn))
	}
	must[string](t)(links[2].prepare(ctx, sn))
	must[mounts](t)(sn.View(ctx, "a view", links[1].name))
	removed := link{number: 0, key: "removed key", name: "removed"}
	check(t, removed.unpack(ctx, sn))
	check(t, sn.Remove(ctx, removed.name))

	for _, form := range [][]string{{"inspect"}, {"inspect", "--json"}} {
		live := must[string](t)(program(t, d, form...))
		for _, s := range []string{links[0].name, links[1].name, links[2].key, "a view", "removed"} {
			if !strings.Contains(live, s) {
				t.Errorf("%v: nothing of %q:\n%s", form, s, live)
			}
		}
		check(t, d.Stop())
		stopped := must[string](t)(program(t, d, form...))
		// Of a stopped one it is also known when it was stopped.
		stopped = regexp.MustCompile(`,\s*"stopped": "[^"]*"`).ReplaceAllString(stopped, "")
		if stopped != live {
			t.Errorf("%v of a live daemon:\n%s\nand of a stopped one:\n%s", form, live, stopped)
		}
		check(t, d.Start(ctx))
	}
}
