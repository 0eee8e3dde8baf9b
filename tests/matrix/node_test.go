package matrix

import (
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// limit is how long anything may take that a job waits for: the machine may be slow.
const limit = time.Minute

// node is a node of one release, with the CRI plugin and a daemon that does what it does
// by default: heal, fetch, drop, announce.
type node struct {
	*kit.Node
	guest  kit.Layer // the program of all containers
	puller kit.Puller
	tls    string // host and port at which the registry is reached over TLS
	mark   int    // length of the daemon's log when the job began
}

// newNode starts a node, with the daemon of the tree unless d has another one.
func newNode(t testing.TB, release string, d kit.DaemonOptions) *node {
	t.Helper()
	bins := kittest.Release(t, release)
	version := must[[]byte](t)(exec.Command(bins.Containerd, "--version").Output())
	if number := strings.Replace(release, kit.Debian, "1.6.20", 1); !strings.Contains(string(version), " "+number) {
		t.Fatalf("the containerd of release %s prints %q", release, version)
	}
	dir := kittest.Scratch(t)
	r := must[*kit.Registry](t)(kit.StartRegistry(filepath.Join(dir, "registry")))
	runnable := must[kit.Image](t)(kit.Runnable(t.Context()))
	n := &node{guest: runnable.Layers[1], tls: serveTLS(t, r)}
	pause := must[kit.Pushed](t)(kit.Push(t.Context(), r, "pause", kit.Image{
		Cmd:    []string{"/bin/guest", "wait"},
		Layers: []kit.Layer{kit.NewLayer(kit.Gzip, kit.Dir("proc", 0o555), kit.Dir("sys", 0o555), kit.Dir("dev", 0o755)), n.guest},
	}))
	c := kit.ContainerdOptions{Binaries: bins, ConfigVersion: kit.ConfigVersion(release), CRI: &kit.CRIOptions{Pause: pause.Ref}}
	if kit.Since(release, "2.3.7") {
		c.Unpacks = 3
	}
	d.Config = "[heal]\nregistry = true\nhosts = ''\n"
	n.Node = kittest.NewNode(t, kit.NodeOptions{Dir: dir, Registry: r, Heals: true, Notifies: true, Containerd: c, Daemon: d})
	t.Cleanup(func() { check(t, n.Off()) }) // a job that has failed may have left containers
	kittest.Start(t, n.Node)
	check(t, n.CRI.Pull(t.Context(), pause.Ref))
	return n
}

// serveTLS serves a registry at another port over TLS, with a certificate that the programs
// trust which are started later in this test.
func serveTLS(t testing.TB, r *kit.Registry) (host string) {
	t.Helper()
	s := httptest.NewTLSServer(httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: r.Host}))
	t.Cleanup(s.Close)
	file := filepath.Join(kittest.Scratch(t), "ca.pem")
	check(t, os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o644))
	t.Setenv("SSL_CERT_FILE", file)
	return s.Listener.Addr().String()
}

// begin begins a job.
func (n *node) begin(t testing.TB) { n.mark = len(must[string](t)(n.Daemon.Log())) }

// event waits until the daemon has logged one of some events since the job began, and
// returns which, and its line.
func (n *node) event(t testing.TB, events ...string) (event, line string) {
	t.Helper()
	kittest.WaitFor(t, limit, func() error {
		for line = range strings.Lines(must[string](t)(n.Daemon.Log())[n.mark:]) {
			for _, event = range events {
				if strings.Contains(line, `"event":"`+event+`"`) {
					return nil
				}
			}
		}
		return fmt.Errorf("none of the events %q was logged", events)
	})
	return event, line
}

// undamaged fails the job if the daemon has found damage since it began, whatever became of
// it: a layer that was not synced heals from its blob.
func (n *node) undamaged(t testing.TB) {
	t.Helper()
	for line := range strings.Lines(must[string](t)(n.Daemon.Log())[n.mark:]) {
		if strings.Contains(line, `"event":"layer_damaged"`) {
			t.Errorf("the power cut has damaged a layer: %s", line)
		}
	}
}

// image is an image in the registry, with what its containers must see.
type image struct {
	kit.Pushed
	name  string
	tree  kit.Tree
	links map[string]string
}

// push pushes an image of three layers of which no other image has the chains, with what
// is easily lost in a layer: owners, attributes, parents that have no entry, and marks.
func (n *node) push(t testing.TB, name string) image {
	t.Helper()
	img := kit.Image{Cmd: []string{"/bin/guest", "echo", name}, Layers: []kit.Layer{
		kit.NewLayer(kit.Gzip, kit.Dir("proc", 0o555), kit.Dir("sys", 0o555), kit.Dir("dev", 0o755), kit.Dir("etc", 0o755),
			kit.File("etc/name", 0o644, name), kit.File("etc/gone", 0o644, "gone"), kit.Dir("srv", 0o1777), kit.File("srv/old", 0o644, "old"),
			kit.Dir("private", 0o700).WithOwner(1000, 1001).WithXattr("user.note", "mine"), kit.File("private/key", 0o600, name).WithOwner(1000, 1001)),
		n.guest,
		kit.NewLayer(kit.Gzip, kit.File("private/deep/er/file", 0o640, name), kit.Whiteout("etc/gone"), kit.Opaque("srv"),
			kit.File("srv/new", 0o4755, name), kit.Hardlink("srv/same", "srv/new", 0o4755),
			kit.File("srv/able", 0o755, name).WithXattr("security.capability", kit.Capability(1<<10)),
			kit.File("srv/spare", 0o644, strings.Repeat(name, 5000))),
	}}
	tree, links, err := img.Model()
	check(t, err)
	return image{must[kit.Pushed](t)(n.Push(t.Context(), name, img)), name, tree, links}
}

// pull is push, and a pull as the kubelet does it.
func (n *node) pull(t testing.TB, name string) image {
	t.Helper()
	img := n.push(t, name)
	check(t, n.CRI.Pull(t.Context(), img.Ref))
	return img
}

// view is what a container of an image sees under a snapshotter.
func (n *node) view(t testing.TB, snapshotter string, img image) (kit.Tree, map[string]string, error) {
	ctx, cl, err := n.Client(t.Context())
	if err != nil {
		return nil, nil, err
	}
	defer cl.Close()
	n.puller.Client, n.puller.Snapshotter = cl, snapshotter
	return n.puller.View(ctx, kit.CRINamespace, img.Top())
}

// same is an error unless the tree of an image is that of its tars.
func (n *node) same(t testing.TB, img image) error {
	tree, links, err := n.view(t, "durable", img)
	if err != nil {
		return err
	}
	if text := kit.SameView(img.tree, img.links, tree, links); text != "" {
		return fmt.Errorf("the tree of image %s differs from its tars:\n%s", img.name, text)
	}
	return nil
}

// whole fails the job unless an image is known to the CRI plugin and ready, its tree is that
// of its tars, and a container of it runs.
func (n *node) whole(t testing.TB, all ...image) {
	t.Helper()
	for _, img := range all {
		check(t, n.CRI.WaitKnown(t.Context(), img.Ref, true))
		if err := n.same(t, img); err != nil {
			t.Error(err)
		}
		if got := n.run(t, "--rm", img, "once"); got != img.name+"\n" {
			t.Errorf("a container of image %s has printed %q", img.name, got)
		}
	}
	stdout, stderr, status := kittest.Verb(t, n.Daemon, "check", "--images", "--deep", "--json")
	var found []struct{ Image, Verdict, Reason string }
	if err := json.Unmarshal([]byte(stdout), &found); err != nil {
		t.Fatalf("check --images: status %d: %v: %s%s", status, err, stdout, stderr)
	}
	for _, img := range all {
		ready := false
		for _, f := range found {
			if f.Image == img.Ref {
				if ready = f.Verdict == "ready"; !ready {
					t.Errorf("check --images reports of image %s: %s (%s)", img.name, f.Verdict, f.Reason)
				}
			}
		}
		if !ready {
			t.Errorf("check --images does not report image %s as ready", img.name)
		}
	}
}

// run runs a container with ctr.
func (n *node) run(t testing.TB, flag string, img image, id string, command ...string) string {
	t.Helper()
	args := []string{"run", flag, "--snapshotter", "durable", img.Ref, id}
	return kittest.Ctr(t, n.Node, append(args, command...)...)
}

// exec runs the guest program in a running container.
func (n *node) exec(t testing.TB, id string, args ...string) string {
	t.Helper()
	return kittest.Exec(t, n.Node, id, args...)
}

// remove removes a container that runs.
func (n *node) remove(t testing.TB, id string) {
	t.Helper()
	kittest.Ctr(t, n.Node, "task", "rm", "--force", id)
	kittest.Ctr(t, n.Node, "container", "rm", id)
}

// top is the daemon's row of the top layer of an image. Of a layer that is there twice it is
// the later: containerd has forgotten the other.
func (n *node) top(t testing.TB, img image) kit.Row {
	t.Helper()
	for _, r := range slices.Backward(kittest.Inspect(t, n.Daemon).Snapshots) {
		if strings.HasPrefix(r.Name, kit.CRINamespace+"/") && strings.HasSuffix(r.Name, "/"+img.Top()) {
			return r
		}
	}
	t.Fatalf("the daemon has no row of the top layer of image %s", img.name)
	return kit.Row{}
}

// damage removes a file of the top layer of an image, and cuts another one short.
func (n *node) damage(t testing.TB, img image) {
	t.Helper()
	dir := n.Daemon.LayerDir(n.top(t, img).ID)
	check(t, errors.Join(os.Remove(filepath.Join(dir, "srv/able")), os.Truncate(filepath.Join(dir, "srv/spare"), 7)))
}

// blob is the file of the blob of the top layer of an image.
func (n *node) blob(img image) string { return n.Blob(img.Layers[len(img.Layers)-1].Digest) }
