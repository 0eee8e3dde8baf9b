package upgrade

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// pulled is an image, and what a container must see of it.
type pulled struct {
	kit.Pushed
	tree  kit.Tree
	links map[string]string
}

// load is what goes on while the program is replaced.
type load struct {
	*testing.T
	node   *kit.Node
	puller *kit.Puller
	images []pulled
	stop   chan struct{}
	all    sync.WaitGroup

	ended                  [lanes]atomic.Int64 // of pulls, then of pods
	retried, probes, tries atomic.Int64        // tries: what has failed and is being tried again
}

// lanes are as many as there are ways to pull, and one for pods.
const lanes = 4

// settled waits until each lane has ended something since the call, and nothing is being tried
// again: what meets two upgrades may fail twice. It is false when the test has failed.
func (l *load) settled() bool {
	var before [lanes]int64
	for i := range before {
		before[i] = l.ended[i].Load()
	}
	for deadline := time.Now().Add(3 * time.Minute); !l.Failed(); time.Sleep(20 * time.Millisecond) {
		done := l.tries.Load() == 0
		for i := range before {
			done = done && l.ended[i].Load() > before[i]
		}
		if done {
			return true
		}
		if time.Now().After(deadline) {
			l.Error("a lane has ended nothing for three minutes")
		}
	}
	return false
}

// pulls is how many pulls have succeeded.
func (l *load) pulls() (n int64) {
	for i := range kit.Ways {
		n += l.ended[i].Load()
	}
	return n
}

func TestUpgrade(t *testing.T) {
	l := &load{T: t, stop: make(chan struct{})}
	l.node = l.newNode()
	old, next := l.program("v1.0.0"), l.program("v1.1.0")
	binary := filepath.Join(kittest.Scratch(t), "durable-snapshotter")
	replace(t, binary, old)
	l.node.Daemon.Use(binary)
	kittest.Start(t, l.node)
	l.puller = &kit.Puller{Snapshotter: "durable", CRI: l.node.CRI}
	l.puller.Client = kittest.Must[*client.Client](t)(client.New(l.node.Containerd.Address, client.WithTimeout(30*time.Second)))
	defer l.puller.Client.Close()

	standing := []*standing{l.newPod(), l.newPod()}
	for _, s := range standing {
		l.all.Go(func() { l.probe(s) })
	}
	for i, way := range kit.Ways {
		l.all.Go(func() { l.pull(i, way) })
	}
	l.all.Go(l.startPods)
	rng := rand.New(rand.NewPCG(*seed, 100))
	var longest time.Duration
	for i := range *upgrades {
		if !l.settled() {
			break
		}
		time.Sleep(time.Duration(rng.IntN(1500)) * time.Millisecond) // in the middle of something
		program, version := next, "v1.1.0"
		if i%2 == 1 {
			program, version = old, "v1.0.0"
		}
		replace(t, binary, program)
		began := time.Now()
		kittest.Check(t, l.node.Daemon.Restart(t.Context()))
		longest = max(longest, time.Since(began))
		kittest.WaitFor(t, time.Minute, func() error { // the log comes after the first answers
			log, err := l.node.Daemon.Log()
			if at := strings.LastIndex(log, `"msg":"serving"`); at < 0 || !strings.Contains(log[at:], `"version":"`+version+`"`) {
				return errors.Join(err, fmt.Errorf("upgrade %d: version %s does not serve", i, version))
			}
			return nil
		})
	}
	time.Sleep(time.Second)
	close(l.stop)
	l.all.Wait()
	for _, s := range standing {
		l.verify(s)
	}
	l.nothingLost()
	t.Logf("%d upgrades, %v at most; %d pulls, %d pods started, %d calls of both tried again; %d probes of pods that stand",
		*upgrades, longest.Round(time.Millisecond), l.pulls(), l.ended[lanes-1].Load(), l.retried.Load(), l.probes.Load())
	if l.pulls() < int64(3**upgrades) || l.probes.Load() < int64(*upgrades) {
		t.Error("there was no load")
	}
	for _, s := range standing {
		kittest.Check(t, s.Remove(t.Context()))
	}
}

// program builds the daemon with a version of its own.
func (l *load) program(version string) string {
	l.Helper()
	return kittest.Must[string](l)(kit.BuildDaemon(l.Context(), "durable-snapshotter-"+version, "-ldflags=-X main.version="+version))
}

// replace puts a program in the place of another one in one step, as dpkg does: its inode is
// in use.
func replace(t *testing.T, path, program string) {
	t.Helper()
	text := kittest.Must[[]byte](t)(os.ReadFile(program))
	kittest.Check(t, errors.Join(os.WriteFile(path+".new", text, 0o755), os.Rename(path+".new", path)))
}

// newNode makes a node whose sockets outlive its daemon, and pushes the images.
func (l *load) newNode() *kit.Node {
	l.Helper()
	registry := kittest.Must[*kit.Registry](l)(kit.StartRegistry(filepath.Join(kittest.Scratch(l), "registry")))
	l.Cleanup(func() { kittest.Check(l, registry.Close()) })
	runnable := kittest.Must[kit.Image](l)(kit.Runnable(l.Context()))
	runnable.Cmd = []string{"/bin/guest", "wait"}
	body := strings.Repeat("0123456789abcdef", 64<<10)
	base := kit.NewLayer(kit.Gzip, kit.Dir("etc", 0o711).WithOwner(0, 12), kit.File("etc/passwd", 0o644, "root"), kit.File("big", 0o4755, body),
		kit.Hardlink("again", "big", 0o4755), kit.Dir("srv", 0o1777), kit.File("srv/old", 0o644, "old").WithXattr("user.note", "mine"))
	removes := kit.NewLayer(kit.Zstd, kit.Whiteout("etc/passwd"), kit.Opaque("srv"), kit.File("srv/new", 0o644, "new"))
	other := kit.NewLayer(kit.Plain, kit.File("etc/deep/er/file", 0o640, body+"other"))
	for i, img := range []kit.Image{runnable, {Layers: []kit.Layer{base, removes}}, {Layers: []kit.Layer{base, other}}, {Layers: []kit.Layer{other, base, removes}}} {
		p := pulled{Pushed: kittest.Must[kit.Pushed](l)(kit.Push(l.Context(), registry, fmt.Sprint("i", i), img))}
		var err error
		p.tree, p.links, err = img.Model()
		kittest.Check(l, err)
		l.images = append(l.images, p)
	}
	dir := kittest.Scratch(l)
	run := filepath.Join(dir, "ds")
	kittest.Check(l, os.MkdirAll(run, 0o755))
	var sockets []*os.File
	for _, name := range []string{"durable.sock", "admin.sock"} {
		s := kittest.Must[*net.UnixListener](l)(net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(run, name), Net: "unix"}))
		f := kittest.Must[*os.File](l)(s.File())
		l.Cleanup(func() { f.Close(); s.Close() })
		sockets = append(sockets, f)
	}
	return kittest.NewNode(l, kit.NodeOptions{
		Dir: dir, Heals: true, Notifies: true, Daemon: kit.DaemonOptions{Sockets: sockets},
		Containerd: kit.ContainerdOptions{CRI: &kit.CRIOptions{Pause: l.images[0].Ref, Snapshotter: "durable"}},
	})
}

func (l *load) stopped() bool {
	select {
	case <-l.stop:
		return true
	default:
		return l.Failed()
	}
}

// again is when a client tries again. The kubelet does after ten seconds (backOffPeriod,
// pkg/kubelet/kubelet.go); containerd connects to the daemon again within three
// (cmd/containerd/server/server.go:402 of containerd 2.4.2).
const again = 5 * time.Second

// twice is a client that tries again once.
func (l *load) twice(what string, do func() error) {
	err := do()
	if err == nil {
		return
	}
	l.retried.Add(1)
	l.tries.Add(1)
	defer l.tries.Add(-1)
	l.Logf("%s, at the first try: %v", what, err)
	time.Sleep(again)
	if err := do(); err != nil {
		l.Errorf("%s, at the second try: %v", what, err)
	}
}

// pull pulls images and removes them.
func (l *load) pull(lane int, way kit.Way) {
	rng := rand.New(rand.NewPCG(*seed, uint64(lane)))
	namespace := fmt.Sprint("lane", lane)
	if way == kit.ByCRI {
		namespace = kit.CRINamespace
	}
	in := namespaces.WithNamespace(l.Context(), namespace)
	for !l.stopped() {
		img := l.images[1+rng.IntN(len(l.images)-1)] // pods stand on the first
		l.twice(fmt.Sprintf("pull %s by %s", img.Ref, way), func() error { return l.puller.Pull(l.Context(), way, namespace, img.Ref) })
		l.ended[lane].Add(1)
		if rng.IntN(3) > 0 {
			// What a collection cannot remove now, the next one does.
			if err := l.puller.Client.ImageService().Delete(in, img.Ref, images.SynchronousDelete()); err != nil && !errdefs.IsNotFound(err) {
				l.Logf("remove %s: %v", img.Ref, err)
			}
		}
	}
}

// standing is a pod with a container that runs all the time.
type standing struct {
	*kit.Pod
	container string
	pid       uint32
}

func (l *load) newPod() *standing {
	l.Helper()
	kittest.Check(l, l.node.CRI.Pull(l.Context(), l.images[0].Ref))
	s := &standing{Pod: kittest.Must[*kit.Pod](l)(l.node.CRI.StartPod(l.Context()))}
	s.container = kittest.Must[string](l)(s.Create(l.Context(), l.images[0].Ref))
	kittest.Check(l, s.Start(l.Context(), s.container))
	s.pid = l.task(s)
	_, err := l.exec(s, "begin", "write", "/tmp/before", "written before")
	kittest.Check(l, err)
	return s
}

// task returns the process of a container.
func (l *load) task(s *standing) uint32 {
	l.Helper()
	ctx, cl, err := l.node.Client(l.Context())
	kittest.Check(l, err)
	defer cl.Close()
	c := kittest.Must[client.Container](l)(cl.LoadContainer(ctx, s.container))
	return kittest.Must[client.Task](l)(c.Task(ctx, nil)).Pid()
}

func (l *load) exec(s *standing, id string, args ...string) (string, error) {
	return l.node.Ctr(l.Context(), append([]string{"task", "exec", "--exec-id", id, s.container, "/bin/guest"}, args...)...)
}

// probe reads and writes in a container. It must succeed at any time.
func (l *load) probe(s *standing) {
	for !l.stopped() {
		n := l.probes.Add(1)
		out, err := l.exec(s, fmt.Sprint("read", n), "cat", "/etc/motd")
		if err == nil {
			_, err = l.exec(s, fmt.Sprint("write", n), "write", "/tmp/during", fmt.Sprint(n))
		}
		if err != nil || out != "third layer\n" {
			l.Errorf("a container that stands: %q, %v", out, err)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// verify verifies that a container is the one that was started.
func (l *load) verify(s *standing) {
	l.Helper()
	if out, err := l.exec(s, "end", "cat", "/tmp/before"); err != nil || out != "written before" {
		l.Errorf("what was written before: %q, %v", out, err)
	}
	if pid := l.task(s); pid != s.pid {
		l.Errorf("the container is process %d, and was %d", pid, s.pid)
	}
}

// startPods starts pods and ends them, as a kubelet that tries again does.
func (l *load) startPods() {
	for !l.stopped() {
		var pod *kit.Pod
		l.twice("start a sandbox", func() (err error) { pod, err = l.node.CRI.StartPod(l.Context()); return err })
		if pod == nil {
			return
		}
		id := ""
		l.twice("create a container", func() (err error) { id, err = pod.Create(l.Context(), l.images[0].Ref); return err })
		if id != "" {
			l.twice("start a container", func() error { return pod.Start(l.Context(), id) })
		}
		l.twice("remove a pod", func() error { return pod.Remove(l.Context()) })
		l.ended[lanes-1].Add(1)
	}
}

// nothingLost reads each image that containerd has, and all layers.
func (l *load) nothingLost() {
	l.Helper()
	read := 0
	for _, namespace := range []string{"lane0", "lane1", kit.CRINamespace} {
		in := namespaces.WithNamespace(l.Context(), namespace)
		for _, img := range kittest.Must[[]images.Image](l)(l.puller.Client.ImageService().List(in)) {
			i := slices.IndexFunc(l.images, func(p pulled) bool { return p.Ref == img.Name })
			if i < 0 {
				continue // a digest, of the CRI plugin's
			}
			tree, links, err := l.puller.View(l.Context(), namespace, l.images[i].Top())
			if err != nil {
				l.Errorf("%s in %s: %v", img.Name, namespace, err)
				continue
			}
			read++
			if diff := kit.SameView(l.images[i].tree, l.images[i].links, tree, links); diff != "" {
				l.Errorf("%s in %s: %s", img.Name, namespace, diff)
			}
		}
	}
	if read == 0 {
		l.Error("no image is left to be read")
	}
	if out, stderr, status := kittest.Verb(l, l.node.Daemon, "check", "--deep"); status != 0 {
		l.Errorf("check --deep: status %d: %s%s", status, out, stderr)
	}
	kittest.WaitFor(l, time.Minute, func() error {
		out, stderr, status := kittest.Verb(l, l.node.Daemon, "repair", "--orphans")
		if status != 0 {
			return fmt.Errorf("repair --orphans: status %d: %s%s", status, out, stderr)
		}
		return nil
	})
}
