package images

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"google.golang.org/grpc"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// point is where the power goes: at a call of containerd's that is about a layer being
// unpacked, or before or after the whole operation.
type point struct {
	call  string // prepare, commit; fetch: while blobs arrive; "": when the operation has been acknowledged
	layer int    // of the operation, counted from 0: which of the calls
	after bool   // when the daemon has answered, and containerd does not know it yet
}

func (p point) String() string {
	when := "before"
	if p.after {
		when = "after"
	}
	switch p.call {
	case "":
		return "acknowledged"
	case "fetch":
		return p.call
	}
	return fmt.Sprintf("%s-%s-%d", when, p.call, p.layer)
}

// plug cuts the power at a point of an operation of containerd's.
type plug struct {
	mu    sync.Mutex
	at    *point // nil: nowhere
	seen  map[string]int
	pull  func() error  // shuts the file system down
	gone  chan struct{} // closed when the power is gone
	fault error         // of pull
}

// arm has the power go at a point.
func (p *plug) arm(at point, pull func() error) (gone <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.at, p.pull, p.seen, p.gone = &at, pull, map[string]int{}, make(chan struct{})
	return p.gone
}

// disarm has it go nowhere, and returns the error with which it has gone.
func (p *plug) disarm() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.at = nil
	return p.fault
}

// reached cuts the power when a call is where it is to go.
func (p *plug) reached(call string, after bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.at == nil {
		return
	}
	if !after {
		p.seen[call]++
	}
	if p.at.call == call && p.at.after == after && p.seen[call] == p.at.layer+1 {
		p.at = nil
		p.fault = p.pull()
		close(p.gone)
	}
}

// intercept stands between containerd and the daemon.
func (p *plug) intercept(ctx context.Context, request any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	call := ""
	switch r := request.(type) {
	case *snapshotsapi.PrepareSnapshotRequest:
		if strings.Contains(r.Key, "/extract-") {
			call = "prepare"
		}
	case *snapshotsapi.CommitSnapshotRequest:
		call = "commit"
	}
	if call == "" {
		return next(ctx, request)
	}
	p.reached(call, false)
	answer, err := next(ctx, request)
	if err == nil {
		p.reached(call, true)
	}
	return answer, err
}

// modeled is an image, and what a container must see of it.
type modeled struct {
	kit.Pushed
	tree  kit.Tree
	links map[string]string
}

// cuts is a node whose power is cut again and again.
type cuts struct {
	*node
	snapshotter string
	plug        *plug
	all         []modeled
	acked       []string // references of images that CRI must list
	usual       time.Duration
}

func newCuts(t *testing.T, fs string) *cuts {
	t.Helper()
	c := &cuts{plug: &plug{}}
	c.node = newNodeWith(t, nodeOptions{fs: fs, between: c.plug.intercept})
	c.snapshotter = "durable"
	c.remember(t, c.node.pause, c.pauseImage())
	c.acked = append(c.acked, c.node.pause.Ref)
	return c
}

func (c *cuts) remember(t *testing.T, img kit.Pushed, of kit.Image) {
	t.Helper()
	tree, links, err := of.Model()
	check(t, err)
	c.all = append(c.all, modeled{img, tree, links})
}

// image pushes an image with two layers of its own on the base. The lower one takes a while.
func (c *cuts) image(t *testing.T, name string) kit.Pushed {
	t.Helper()
	var large strings.Builder
	for i := range 40_000 {
		fmt.Fprintf(&large, "%s %d %x\n", name, i, i*i*2_654_435_761)
	}
	of := kit.Image{Cmd: []string{"/bin/guest", "wait"}, Layers: []kit.Layer{
		c.base,
		kit.NewLayer(kit.Gzip, kit.Dir("proc", 0o555), kit.Dir("sys", 0o555), kit.Dir("dev", 0o755), kit.Dir("lower", 0o750).WithOwner(7, 8), kit.File("lower/large", 0o644, large.String()), kit.File("lower/goes", 0o600, name)),
		kit.NewLayer(kit.Zstd, kit.Dir("own", 0o755), kit.File("own/name", 0o644, name+"\n"), kit.Whiteout("lower/goes"), kit.Hardlink("own/again", "own/name", 0o644)),
	}}
	img := must[kit.Pushed](t)(c.Push(t.Context(), name, of))
	c.remember(t, img, of)
	return img
}

// images is that of node. The verb must know the address that containerd knows; the daemon's
// other socket is beside both.
func (c *cuts) images(t *testing.T, verb string, args ...string) (results, int) {
	t.Helper()
	own := c.Daemon.Address
	defer func() { c.Daemon.Address = own }()
	c.Daemon.Address = filepath.Join(filepath.Dir(own), "between.sock")
	return c.node.images(t, verb, args...)
}

// cut does something, has the power go at a point of it, and boots the node. It reports
// whether what was done was acknowledged before.
func (c *cuts) cut(t *testing.T, at point, do func(context.Context) error) (acked bool) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	gone, done := c.plug.arm(at, c.Disk.Shutdown), make(chan error, 1)
	began := time.Now()
	go func() { done <- do(ctx) }()
	var err error
	answered := false
	switch at.call {
	case "":
		err, answered = <-done, true
		check(t, err)
		c.usual = time.Since(began)
	case "fetch":
		time.Sleep(c.usual / 4)
		check(t, c.Disk.Shutdown())
	default:
		select {
		case <-gone:
		case err := <-done:
			t.Fatalf("%v: the operation has come to its end before: %v", at, err)
		case <-time.After(2 * time.Minute):
			t.Fatalf("%v: not reached", at)
		}
	}
	check(t, c.plug.disarm())
	check(t, c.CutPower())
	cancel()
	if !answered {
		err = <-done
	}
	c.boot(t)
	return err == nil
}

// boot starts what a machine starts.
func (c *cuts) boot(t *testing.T) {
	t.Helper()
	check(t, c.Start(t.Context()))
	check(t, c.CRI.RemovePods(t.Context()))
}

// verify fails the test unless CRI lists what was acknowledged, and a container of each image
// that it lists can be created and has the tree of its tars. Those named run, too.
func (c *cuts) verify(t *testing.T, run ...string) {
	t.Helper()
	for _, text := range c.wrong(t, run...) {
		t.Error(text)
	}
	if found, status := c.images(t, "check", "--deep"); status != 0 {
		t.Errorf("check --images --deep: status %d: %+v", status, found)
	}
}

// wrong is what verify finds of the images.
func (c *cuts) wrong(t *testing.T, run ...string) (found []string) {
	t.Helper()
	note := func(format string, args ...any) { found = append(found, fmt.Sprintf(format, args...)) }
	listed := must[[]string](t)(c.CRI.List(t.Context()))
	for _, ref := range c.acked {
		if !slices.Contains(listed, ref) {
			note("CRI does not list %s, which was acknowledged", ref)
		}
	}
	ctx, cl, err := c.Client(t.Context())
	check(t, err)
	defer cl.Close()
	puller := &kit.Puller{Client: cl, Snapshotter: c.snapshotter}
	p, err := c.CRI.StartPod(t.Context())
	if err != nil {
		note("no pod starts: %v", err)
		return found
	}
	defer func() { check(t, p.Remove(context.WithoutCancel(t.Context()))) }()
	for _, img := range c.all {
		if !slices.Contains(listed, img.Ref) {
			continue
		}
		id, err := p.Create(t.Context(), img.Ref, "/bin/guest", "sum", "/bin")
		if err != nil {
			note("CRI lists %s, and does not create a container of it: %v", img.Ref, err)
			continue
		}
		tree, links, err := puller.Container(ctx, kit.CRINamespace, id)
		check(t, err)
		if text := kit.SameView(img.tree, img.links, tree, links); text != "" {
			note("a container of %s differs from the tars:\n%s", img.Ref, text)
		} else if slices.Contains(run, img.Ref) {
			check(t, p.Start(t.Context(), id))
			if code := must[int32](t)(p.Wait(t.Context(), id)); code != 0 {
				note("a container of %s has ended with %d", img.Ref, code)
			}
		}
		check(t, p.RemoveContainer(t.Context(), id))
	}
	return found
}

// pulls are the points of a pull by CRI. The first one measures how long a pull takes.
var pulls = map[string][]point{
	"ext4": {
		{}, {call: "fetch"}, {call: "prepare", after: true}, {call: "commit"}, {call: "commit", after: true},
		{call: "prepare", layer: 1}, {call: "commit", layer: 1}, {call: "commit", layer: 1, after: true},
	},
	"xfs": {{}, {call: "commit", after: true}, {call: "commit", layer: 1, after: true}},
}

// creations are those of the creation of a container whose image is not unpacked.
var creations = map[string][]point{
	"ext4": {{}, {call: "prepare"}, {call: "commit", after: true}, {call: "commit", layer: 1, after: true}},
	"xfs":  {{}, {call: "commit", layer: 1}},
}

// TestCutPull cuts the power at points that are spread over pulls of the CRI plugin, and right
// after their ends. After each boot every pull that was acknowledged is listed, and every image that
// is listed runs, with the tree of its tars; what was cut can be pulled again.
//
// Then, without a registry, images are imported and not unpacked, as k3s does with its archives:
// the CRI plugin unpacks one when it creates a container. The power goes while it does, and the
// same is verified; an image whose import was acknowledged is as good as one that was pulled.
func TestCutPull(t *testing.T) {
	for fs := range pulls {
		t.Run(fs, func(t *testing.T) {
			t.Parallel()
			c := newCuts(t, fs)
			last := c.node.pause.Ref
			for i, at := range pulls[fs] {
				if !kittest.Turn(i, 2) && fs == "ext4" {
					continue
				}
				img := c.image(t, "pulled-"+at.String())
				acked := c.cut(t, at, func(ctx context.Context) error { return c.CRI.Pull(ctx, img.Ref) })
				if acked {
					c.acked = append(c.acked, img.Ref)
				}
				c.verify(t, last, img.Ref)
				check(t, c.CRI.Pull(t.Context(), img.Ref))
				if !slices.Contains(c.acked, img.Ref) {
					c.acked = append(c.acked, img.Ref)
				}
				last = img.Ref
				t.Logf("pull, %v: acknowledged %v", at, acked)
			}
			c.verify(t, last)
			c.cutCreations(t, creations[fs])
			kittest.NoPanic(t, must[string](t)(c.Daemon.Log()))
		})
	}
}

// TestCutControl is the first of these cuts under the built-in overlayfs. If nothing were wrong
// there, it would mean nothing elsewhere.
func TestCutControl(t *testing.T) {
	t.Parallel()
	dir := scratch(t)
	r := must[*kit.Registry](t)(kit.StartRegistry(filepath.Join(dir, "registry")))
	c := &cuts{node: &node{dir: dir, base: must[kit.Image](t)(kit.Runnable(t.Context())).Layers[1]}, plug: &plug{}, snapshotter: "overlayfs"}
	c.node.pause = must[kit.Pushed](t)(kit.Push(t.Context(), r, "pause", c.pauseImage()))
	c.Node = kittest.StartNode(t, kit.NodeOptions{
		Dir: dir, Registry: r, BuiltIn: true,
		Containerd: kit.ContainerdOptions{CRI: &kit.CRIOptions{Pause: c.node.pause.Ref, Snapshotter: c.snapshotter}},
	})
	img := c.image(t, "control")
	if acked := c.cut(t, point{}, func(ctx context.Context) error { return c.CRI.Pull(ctx, img.Ref) }); !acked {
		t.Fatal("the pull was not acknowledged")
	}
	c.acked = []string{img.Ref}
	found := c.wrong(t, img.Ref)
	if len(found) == 0 {
		t.Error("under the built-in overlayfs nothing is wrong after a cut: the cut is none")
	}
	t.Log(found)
}

// cutCreations is the second part of TestCutPull.
func (c *cuts) cutCreations(t *testing.T, points []point) {
	t.Helper()
	archives := map[point]string{}
	for _, at := range points {
		img := c.image(t, "imported-"+at.String())
		archives[at] = filepath.Join(c.dir, at.String()+".tar")
		check(t, c.Registry.WriteArchive(archives[at], img))
	}
	imported := c.all[len(c.all)-len(points):]
	check(t, c.GoOffline())
	for i, at := range points {
		img := imported[i]
		must[string](t)(c.Ctr(t.Context(), "images", "import", "--no-unpack", archives[at]))
		c.acked = append(c.acked, img.Ref)
		check(t, c.CRI.WaitKnown(t.Context(), img.Ref, true))
		if i == 0 {
			// An import that nothing was made of yet.
			check(t, c.CutPower())
			c.boot(t)
		}
		if found, _ := c.images(t, "check"); found.of(t, img.Pushed).Verdict != "not unpacked" {
			t.Errorf("%s: %+v", img.Ref, found.of(t, img.Pushed))
		}
		p := must[*kit.Pod](t)(c.CRI.StartPod(t.Context()))
		acked := c.cut(t, at, func(ctx context.Context) error {
			_, err := p.Create(ctx, img.Ref, "/bin/guest", "wait")
			return err
		})
		c.verify(t, img.Ref)
		t.Logf("creation, %v: acknowledged %v", at, acked)
	}
	run := []string{}
	for _, img := range c.all {
		run = append(run, img.Ref)
	}
	c.verify(t, run...)
}
