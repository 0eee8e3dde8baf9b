package doctor

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// node is a node with the CRI plugin, a pause image, and one image of a pod.
type node struct {
	*kit.Node
	dir        string
	base       kit.Layer
	pause, app kit.Pushed
}

// options of a node, for what differs from a healthy one.
type options struct {
	disk        kit.DiskOptions
	daemon      string // keys of the daemon's configuration, before its tables
	extra       string // of containerd's configuration
	snapshotter string // of CRI
	images      string // keys of CRI's table of images
}

func newNode(t *testing.T, o options) *node {
	t.Helper()
	n := &node{dir: scratch(t)}
	r := must[*kit.Registry](t)(kit.StartRegistry(filepath.Join(n.dir, "registry")))
	n.base = must[kit.Image](t)(kit.Runnable(t.Context())).Layers[1]
	n.pause = must[kit.Pushed](t)(kit.Push(t.Context(), r, "pause", n.image("pause")))
	n.app = must[kit.Pushed](t)(kit.Push(t.Context(), r, "app", n.image("app")))
	n.Node = kittest.NewNode(t, kit.NodeOptions{
		Dir: n.dir, Registry: r, Disk: o.disk, Heals: o.daemon == "",
		Daemon: kit.DaemonOptions{Config: fmt.Sprintf("%s\n[images]\nrepair = 'off'\n[containerd]\naddress = '%s'\ndrop_images = false\n", o.daemon, filepath.Join(n.dir, "cd", "containerd.sock"))},
		Containerd: kit.ContainerdOptions{Extra: o.extra, CRI: &kit.CRIOptions{
			Pause: n.pause.Ref, Snapshotter: o.snapshotter, Images: o.images,
		}},
	})
	kittest.Start(t, n.Node)
	for _, img := range []kit.Pushed{n.pause, n.app} {
		check(t, n.CRI.Pull(t.Context(), img.Ref))
	}
	return n
}

// image has a layer of its own on that of the program of containers.
func (n *node) image(name string) kit.Image {
	return kit.Image{Cmd: []string{"/bin/guest", "wait"}, Layers: []kit.Layer{
		n.base, kit.NewLayer(kit.Gzip, kit.Dir("proc", 0o555), kit.Dir("sys", 0o555), kit.Dir("dev", 0o755), kit.Dir("own", 0o755), kit.File("own/name", 0o644, name+"\n")),
	}}
}

// config is containerd's configuration file, which can be changed under the running containerd.
func (n *node) config() string { return filepath.Join(n.dir, "cd", "config.toml") }

// rewrite replaces a text of containerd's configuration file.
func (n *node) rewrite(t *testing.T, old, with string) {
	t.Helper()
	text := string(must[[]byte](t)(os.ReadFile(n.config())))
	if !strings.Contains(text, old) {
		t.Fatalf("no %q in %s:\n%s", old, n.config(), text)
	}
	check(t, os.WriteFile(n.config(), []byte(strings.Replace(text, old, with, 1)), 0o644))
}

// finding is what doctor prints.
type finding struct{ Check, Level, Text, Cure string }

// findings are all of one call.
type findings []finding

// doctor runs doctor, and holds its exit status against what it prints.
func (n *node) doctor(t *testing.T, args ...string) (all findings) {
	t.Helper()
	stdout, stderr, status := kittest.Verb(t, n.Daemon, append([]string{"doctor", "--json"}, args...)...)
	if err := json.Unmarshal([]byte(stdout), &all); err != nil {
		t.Fatalf("status %d: %v: %s%s", status, err, stdout, stderr)
	}
	want := 0
	for _, f := range all {
		want = max(want, slices.Index([]string{"ok", "warning", "failure"}, f.Level))
		if (f.Level == "ok") != (f.Cure == "") {
			t.Errorf("%+v", f)
		}
	}
	if status != want {
		t.Errorf("exit status %d, want %d: %+v", status, want, all)
	}
	return all
}

// bad are those that are not ok, but for what this machine itself may have: a unit is not
// installed under the systemd that it may run, its disk may be slow under other work, and its kernel
// may not show the device of a loop disk.
func (all findings) bad() (bad findings) {
	for _, f := range all {
		if f.Level != "ok" && f.Check != "unit" && f.Check != "sync" && f.Check != "disk" {
			bad = append(bad, f)
		}
	}
	return bad
}

// want fails the test unless exactly this was found of a check, and nothing but it and what
// follows from it.
func (all findings) want(t *testing.T, check, level, text, cure string, follow ...string) {
	t.Helper()
	found := false
	for _, f := range all.bad() {
		switch {
		case f.Check == check && f.Level == level && strings.Contains(f.Text, text) && strings.Contains(f.Cure, cure):
			found = true
		case !slices.Contains(follow, f.Check):
			t.Errorf("also found: %+v", f)
		}
	}
	if !found {
		t.Errorf("%s of %s with %q, cure %q, is not in %+v", level, check, text, cure, all)
	}
}

// of returns the first finding of a check.
func (all findings) of(t *testing.T, check string) finding {
	t.Helper()
	i := slices.IndexFunc(all, func(f finding) bool { return f.Check == check })
	if i < 0 {
		t.Fatalf("no finding of %s in %+v", check, all)
	}
	return all[i]
}

// silent fails the test when anything is found.
func (all findings) silent(t *testing.T) {
	t.Helper()
	if bad := all.bad(); len(bad) > 0 {
		t.Errorf("on a healthy node: %+v", bad)
	}
}
