package readiness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestReport repeats the report that started this project: an image is listed, its
// blob and its layer are renamed on disk by hand, containerd is restarted. The
// image is healed, or not listed; either way the next pull or start works. Nothing
// but the daemon does anything about it.
func TestReport(t *testing.T) {
	t.Parallel()
	for i, c := range []struct {
		name                                string
		blob, containerd, daemon, noNetwork bool
	}{
		{name: "as reported", blob: true, containerd: true},
		{name: "as reported, after a reboot", blob: true, containerd: true, daemon: true},
		{name: "nothing is restarted", blob: true},
		{name: "only the daemon is restarted", blob: true, daemon: true},
		{name: "the blob is there, no registry", containerd: true, noNetwork: true},
		{name: "the blob is there, nothing is restarted, no registry", noNetwork: true},
		{name: "the blob is there, after a reboot, no registry", containerd: true, daemon: true, noNetwork: true},
	} {
		if !kittest.Turn(i, 3) {
			continue
		}
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			n := newNodeWith(t, nodeOptions{acts: true})
			p := n.inUse(t)
			check(t, p.run(t, n.app))
			if c.noNetwork {
				check(t, n.GoOffline())
			}
			dir := filepath.Dir(n.directories(t, n.app)[1]) // snapshots/<id>
			n.stopFor(t, c.containerd, c.daemon)
			check(t, os.Rename(dir, dir+".away"))
			if c.blob {
				blob := n.Blob(n.app.Layers[1].Digest)
				check(t, os.Rename(blob, blob+".away"))
			}
			n.startAgain(t)

			switch {
			case c.containerd && c.blob:
				// When the top snapshot is dropped already, and its names are not, a
				// containerd that starts lists the image, until they are.
				waitFor(t, time.Minute, func() error {
					if n.known(t, n.app) {
						return errors.New("the image is listed after the restart")
					}
					return nil
				})
			case c.containerd && !n.present(t, n.app):
				t.Error("the image is not listed after the restart")
			}
			n.asKubelet(t, p, n.app)
			if !n.present(t, n.app) {
				t.Error("the image runs and is not listed")
			}
		})
	}
}

// TestReportHeld: the same while a container runs on the image, and with the pause
// image, on which every pod stands. What runs goes on; what is new waits until
// an operator brings the blob back with the command that the log names.
func TestReportHeld(t *testing.T) {
	t.Parallel()
	n := newNodeWith(t, nodeOptions{acts: true})
	p := n.inUse(t)
	running := must[string](t)(p.create(t, n.app, "wait"))
	check(t, p.start(t, running))
	for _, c := range []struct {
		img  kit.Pushed
		want func() error
	}{
		{n.app, func() error { return p.run(t, n.app) }},
		{n.pause, func() error { return n.pod(t) }},
	} {
		dir := filepath.Dir(n.directories(t, c.img)[1])
		blob := n.Blob(c.img.Layers[1].Digest)
		check(t, os.Rename(dir, dir+".away"))
		check(t, os.Rename(blob, blob+".away"))
		if err := c.want(); err == nil {
			t.Fatalf("%s: a new container, without its layer", c.img.Ref)
		}
		command := []string{"content", "fetch", "--plain-http", c.img.Ref}
		waitFor(t, time.Minute, func() error {
			if log := must[string](t)(n.Daemon.Log()); !strings.Contains(log, "ctr -n k8s.io content fetch "+c.img.Ref) {
				return errors.New("the log does not name the way out")
			}
			return nil
		})
		must[string](t)(n.ctr(t, command...))
		waitFor(t, time.Minute, c.want)
	}
	n.wantRunning(t, running)
}

// asKubelet starts a container like the kubelet with IfNotPresent: it pulls when
// the image is not listed, and tries again for a while when something fails.
func (n *node) asKubelet(t *testing.T, p *pod, img kit.Pushed) {
	t.Helper()
	waitFor(t, time.Minute, func() error {
		if !n.known(t, img) {
			if err := n.pull(t, img); err != nil {
				return err
			}
		}
		return p.run(t, img)
	})
}

// directories are the daemon's fs directories of an image's layers, lowest first.
func (n *node) directories(t *testing.T, img kit.Pushed) []string {
	t.Helper()
	names := n.backend(t, img)
	sn := must[snapshots.Snapshotter](t)(n.Daemon.Snapshotter())
	defer sn.Close()
	const key = "k8s.io/0/find directories"
	mounts := must[[]mount.Mount](t)(sn.View(t.Context(), key, names[len(names)-1]))
	check(t, sn.Remove(t.Context(), key))
	for _, o := range mounts[0].Options {
		if dirs, ok := strings.CutPrefix(o, "lowerdir="); ok {
			all := strings.Split(dirs, ":")
			for i, j := 0, len(all)-1; i < j; i, j = i+1, j-1 {
				all[i], all[j] = all[j], all[i]
			}
			return all
		}
	}
	t.Fatalf("no lower directories in %v", mounts)
	return nil
}

// stopFor stops what startAgain starts.
func (n *node) stopFor(t *testing.T, containerd, daemon bool) {
	t.Helper()
	if containerd {
		check(t, n.Containerd.Stop())
	}
	if daemon {
		check(t, n.Daemon.Stop())
	}
}

func (n *node) startAgain(t *testing.T) {
	t.Helper()
	if !n.Daemon.Running() {
		check(t, n.Daemon.Start(t.Context()))
	}
	if !n.Containerd.Running() {
		n.restart(t)
	}
}

func (n *node) wantRunning(t *testing.T, id string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	out, err := n.Containerd.Ctr(ctx, "--namespace", k8s, "tasks", "ls")
	check(t, err)
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == id && f[2] == "RUNNING" {
			return
		}
	}
	t.Errorf("container %s does not run:\n%s", id, fmt.Sprint(out))
}
