package images

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// moved is what migrate prints of an image.
type moved struct {
	Image, Namespace, State, Reason string
	Unpacked                        bool
	Old, Containers                 []string
}

// migrate runs migrate.
func (n *node) migrate(t *testing.T, args ...string) (all []moved, status int) {
	t.Helper()
	stdout, stderr, status := kittest.Verb(t, n.Daemon, append([]string{"migrate", "--json"}, args...)...)
	if err := json.Unmarshal([]byte(stdout), &all); err != nil {
		t.Fatalf("migrate %q: status %d: %v: %s%s", args, status, err, stdout, stderr)
	}
	return all, status
}

func movedOf(t *testing.T, all []moved, ref string) moved {
	t.Helper()
	i := slices.IndexFunc(all, func(m moved) bool { return m.Image == ref })
	if i < 0 {
		t.Fatalf("there is no result of %s in %+v", ref, all)
	}
	return all[i]
}

// TestMigrate: images of the built-in overlayfs are unpacked into this snapshotter without a
// registry, under a running container; the old snapshots go when nothing stands on them; and the
// way back is the same.
func TestMigrate(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	pull := func(name string) kit.Pushed {
		img := n.push(t, name)
		must[string](t)(n.Ctr(t.Context(), "image", "pull", "--plain-http", "--snapshotter", "overlayfs", img.Ref))
		return img
	}
	app, other, discarded := pull("app"), pull("other"), pull("discarded")
	check(t, os.Remove(n.Blob(discarded.Layers[1].Digest)))
	check(t, n.GoOffline())
	must[string](t)(n.Ctr(t.Context(), "run", "--detach", "--snapshotter", "overlayfs", app.Ref, "old", "/bin/guest", "wait"))
	defer func() { _, _ = n.Ctr(t.Context(), "task", "rm", "--force", "old") }()

	all, status := n.migrate(t)
	if status != 1 {
		t.Errorf("status %d, although an image can only be pulled: %+v", status, all)
	}
	if first := all[0]; first.Image != n.pause.Ref {
		t.Errorf("the first is %s, and not the pause image", first.Image)
	}
	for _, img := range []kit.Pushed{app, other} {
		if m := movedOf(t, all, img.Ref); m.State != "ready, old snapshots kept" || !m.Unpacked || !slices.Equal(m.Old, []string{"overlayfs"}) {
			t.Errorf("%+v", m)
		}
	}
	if m := movedOf(t, all, app.Ref); len(m.Containers) != 1 || !strings.Contains(m.Containers[0], "old") {
		t.Errorf("the container on the old snapshots is not named: %+v", m)
	}
	if m := movedOf(t, all, discarded.Ref); m.State != "needs a pull" || !strings.Contains(m.Reason, discarded.Layers[1].Digest.String()) {
		t.Errorf("%+v", m)
	}
	found, _ := n.images(t, "check")
	for _, img := range []kit.Pushed{app, other} {
		if r := found.of(t, img); r.Verdict != "ready" {
			t.Errorf("%s: %s (%s)", img.Ref, r.Verdict, r.Reason)
		}
	}
	if out := must[string](t)(n.Ctr(t.Context(), "run", "--rm", "--snapshotter", "durable", app.Ref, "new", "/bin/guest", "cat", "/own/name")); out != "app\n" {
		t.Errorf("a container on the new snapshots prints %q", out)
	}

	all, _ = n.migrate(t, "--finish")
	if m := movedOf(t, all, other.Ref); m.State != "ready" || m.Unpacked {
		t.Errorf("after --finish: %+v", m)
	}
	if out := must[string](t)(n.Ctr(t.Context(), "task", "ls")); !strings.Contains(out, "RUNNING") {
		t.Errorf("the container was disturbed: %s", out)
	}
	must[string](t)(n.Ctr(t.Context(), "task", "rm", "--force", "old"))
	must[string](t)(n.Ctr(t.Context(), "container", "rm", "old"))
	// With the names that the CRI plugin has given it.
	var names []string
	for _, line := range strings.Split(must[string](t)(n.Ctr(t.Context(), "images", "ls")), "\n") {
		if f := strings.Fields(line); len(f) > 2 && f[2] == discarded.Manifest.String() {
			names = append(names, f[0])
		}
	}
	must[string](t)(n.Ctr(t.Context(), append([]string{"image", "rm", "--sync"}, names...)...))
	n.wantNone(t, "overlayfs")

	if all, status := n.migrate(t, "--to", "overlayfs", "--finish"); status != 0 {
		t.Errorf("the way back: status %d: %+v", status, all)
	}
	n.wantNone(t, "durable")
	kittest.WaitFor(t, time.Minute, func() error {
		left, err := os.ReadDir(filepath.Join(n.Daemon.Root, "snapshots"))
		if err == nil && len(left) > 0 {
			err = fmt.Errorf("%d directories are left", len(left))
		}
		return err
	})
	must[string](t)(n.Ctr(t.Context(), "run", "--rm", "--snapshotter", "overlayfs", app.Ref, "back", "/bin/guest", "cat", "/own/name"))
	if _, stderr, status := kittest.Verb(t, n.Daemon, "migrate", "--to", "overlaysf"); status != 2 || !strings.Contains(stderr, "overlayfs") {
		t.Errorf("an unknown snapshotter: status %d: %s", status, stderr)
	}
}

// TestFinishNotKnown: the old snapshots of an image stay as long as a layer of its new ones cannot be
// verified, beside an image whose old ones go.
func TestFinishNotKnown(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	app, other := n.push(t, "app"), n.push(t, "other")
	for _, img := range []kit.Pushed{app, other} {
		kittest.Pull(t, n.Node, "overlayfs", img.Ref)
	}
	if all, status := n.migrate(t); status != 0 {
		t.Fatalf("status %d: %+v", status, all)
	}
	at := n.file(t, app, 1, "own")
	check(t, unix.Mount("tmpfs", at, "tmpfs", 0, ""))
	mounted := true
	defer func() {
		if mounted {
			check(t, unix.Unmount(at, 0))
		}
	}()

	all, status := n.migrate(t, "--finish")
	if m := movedOf(t, all, app.Ref); m.State != "not known" || !strings.Contains(m.Reason, "mount") || !slices.Equal(m.Old, []string{"overlayfs"}) {
		t.Errorf("an image that cannot be verified: %+v", m)
	}
	if m := movedOf(t, all, other.Ref); m.State != "ready" || len(m.Old) > 0 {
		t.Errorf("an image beside it: %+v", m)
	}
	if status != 3 {
		t.Errorf("status %d", status)
	}
	old := must[string](t)(n.Ctr(t.Context(), "snapshots", "--snapshotter", "overlayfs", "ls"))
	for img, want := range map[string]bool{app.Top(): true, other.Top(): false} {
		if strings.Contains(old, img) != want {
			t.Errorf("the old snapshot %s is there: %v", img, !want)
		}
	}

	check(t, unix.Unmount(at, 0))
	mounted = false
	if all, status := n.migrate(t, "--finish"); status != 0 {
		t.Errorf("verified again: status %d: %+v", status, all)
	}
	n.wantNone(t, "overlayfs")
}

// wantNone waits until a snapshotter has no snapshot of the node's namespace.
func (n *node) wantNone(t *testing.T, snapshotter string) {
	t.Helper()
	kittest.WaitFor(t, time.Minute, func() error {
		out, err := n.Ctr(t.Context(), "snapshots", "--snapshotter", snapshotter, "ls")
		if lines := strings.Count(strings.TrimSpace(out), "\n"); err == nil && lines > 0 {
			err = fmt.Errorf("%s has %d snapshots", snapshotter, lines)
		}
		return err
	})
}
