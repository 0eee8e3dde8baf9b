package images

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// everything has TestMatrix cover all combinations, and not only all pairs.
var everything = flag.Bool("everything", false, "TestMatrix covers all combinations, not only all pairs")

// The dimensions of the matrix. A layer is damaged, its own blob is good or is not, and then
// its bytes are at one other place, or at none.
var (
	kinds   = []string{"removed", "changed", "emptied", "lost", "blob only"}
	sources = []string{"blob", "other image", "archive", "registry", "nothing"}
	uses    = []string{"free", "exited", "running", "shared", "pause"}
)

// spot is one combination.
type spot struct {
	kind, source, use string
	flaw              string // of the blob

	img, sibling kit.Pushed    // sibling: the healthy image on the same base
	layer        int           // that is damaged
	container    string        // that stands on it
	top          uint64        // of the sibling: the number of its own layer
	elsewhere    digest.Digest // blob of the other image
}

func (s *spot) name() string {
	return strings.ReplaceAll(fmt.Sprintf("%s-%s-%s", s.kind, s.source, s.use), " ", "")
}

// possible reports whether there is such a combination.
func (s *spot) possible() bool {
	switch {
	case s.kind == "lost" && (s.use == "exited" || s.use == "running" || s.use == "pause"):
		return false // the daemon removes no layer on which a container stands
	case s.kind == "blob only" && s.source == "blob":
		return false // nothing has happened to it
	}
	return true
}

// spots are the combinations to cover: all, or so many that each possible pair of values is in
// one of them.
func spots(all bool) (chosen []*spot) {
	var every []*spot
	for _, k := range kinds {
		for _, f := range sources {
			for _, u := range uses {
				if s := (&spot{kind: k, source: f, use: u}); s.possible() {
					every = append(every, s)
				}
			}
		}
	}
	pairs := func(s *spot) [][2]string {
		return [][2]string{{s.kind, "from " + s.source}, {s.kind, s.use}, {"from " + s.source, s.use}}
	}
	open := map[[2]string]bool{}
	for _, s := range every {
		for _, p := range pairs(s) {
			open[p] = true
		}
	}
	news := func(s *spot) (n int) {
		for _, p := range pairs(s) {
			if open[p] {
				n++
			}
		}
		return n
	}
	for len(open) > 0 && !all {
		best := slices.MaxFunc(every, func(a, b *spot) int { return news(a) - news(b) })
		for _, p := range pairs(best) {
			delete(open, p)
		}
		chosen = append(chosen, best)
	}
	if all {
		chosen = every
	}
	for i, s := range chosen {
		if s.source != "blob" {
			s.flaw = []string{"missing", "corrupt", "short"}[i%3]
		}
	}
	return chosen
}

// TestSpots: the combinations that make test covers have every possible pair.
func TestSpots(t *testing.T) {
	some, all := spots(false), spots(true)
	for _, want := range all {
		for _, same := range []func(*spot) bool{
			func(s *spot) bool { return s.kind == want.kind && s.source == want.source },
			func(s *spot) bool { return s.kind == want.kind && s.use == want.use },
			func(s *spot) bool { return s.source == want.source && s.use == want.use },
		} {
			if !slices.ContainsFunc(some, same) {
				t.Errorf("a pair of %s is in none of %d combinations", want.name(), len(some))
			}
		}
	}
	t.Logf("%d of %d combinations", len(some), len(all))
}

// outcome is what is to be found and done.
type outcome struct {
	verdict string
	plan    []string
	ends    string // ready; ready, content incomplete; or dropped
	blocked bool   // until nothing holds it
}

func (s *spot) want() outcome {
	held := s.use == "exited" || s.use == "running" || s.use == "pause"
	here := s.source == "blob" || s.source == "other image" || s.source == "archive"
	ends := map[string]string{"nothing": "dropped", "other image": "ready, content incomplete"}[s.source]
	if ends == "" {
		ends = "ready"
	}
	switch {
	case s.kind == "blob only":
		if s.source == "nothing" {
			ends = "ready, content incomplete"
		}
		return outcome{"ready, content incomplete", []string{"fetch", "drop blobs"}, ends, false}
	case s.kind == "lost" && s.source == "blob":
		return outcome{"healable", []string{"unpack"}, ends, false}
	case s.kind == "lost":
		if s.source == "other image" {
			ends = "dropped" // containerd unpacks the image's own blobs only
		}
		return outcome{"needs fetch", []string{"fetch", "drop layer"}, ends, false}
	case here:
		return outcome{"healable", []string{"heal"}, ends, false}
	case held:
		return outcome{"in use and broken", []string{"heal", "fetch", "drop blobs"}, ends, s.source == "nothing"}
	}
	return outcome{"needs fetch", []string{"heal", "fetch", "drop layer"}, ends, false}
}

// field is a node on which the sources of each image can be taken away one by one.
type field struct {
	*node
	archives, aside string // directories: of the daemon's archives, and of blobs that the registry does not have now
	layers          map[string][]kit.Layer
	pod             *kit.Pod
}

func newField(t *testing.T) *field {
	t.Helper()
	f := &field{archives: filepath.Join(scratch(t), "archives"), aside: scratch(t), layers: map[string][]kit.Layer{}}
	check(t, os.Mkdir(f.archives, 0o755))
	f.node = newNodeWith(t, nodeOptions{heal: fmt.Sprintf("archives = ['%s']\nregistry = true\nhosts = ''\n", f.archives)})
	f.layers[f.pause.Ref] = f.pauseImage().Layers
	f.pod = must[*kit.Pod](t)(f.CRI.StartPod(t.Context()))
	t.Cleanup(func() { _ = f.pod.Remove(context.Background()) })
	return f
}

// image pushes and pulls an image on the base, with further layers.
func (f *field) image(t *testing.T, name string, layers ...kit.Layer) kit.Pushed {
	t.Helper()
	layers = append([]kit.Layer{f.base}, layers...)
	img := must[kit.Pushed](t)(f.Push(t.Context(), name, kit.Image{Cmd: []string{"/bin/guest", "wait"}, Layers: layers}))
	f.layers[img.Ref] = layers
	check(t, f.CRI.Pull(t.Context(), img.Ref))
	return img
}

// own is a layer that no other image has.
func own(name string) kit.Layer {
	return kit.NewLayer(kit.Gzip, kit.Dir("proc", 0o555), kit.Dir("sys", 0o555), kit.Dir("dev", 0o755), kit.Dir("own", 0o755),
		kit.File("own/name", 0o644, name+"\n"), kit.File("own/spare", 0o644, strings.Repeat(name, 1000)))
}

// make makes the images of a combination, and what stands on them.
func (f *field) make(t *testing.T, s *spot) {
	t.Helper()
	name := s.name()
	switch s.use {
	case "pause":
		s.img, s.layer = f.pause, 0
		return
	case "shared":
		shared := kit.NewLayer(kit.Gzip, kit.Dir("own", 0o755), kit.File("own/spare", 0o644, strings.Repeat(name, 1000)))
		top := func(of string) kit.Layer {
			return kit.NewLayer(kit.Gzip, kit.Dir("proc", 0o555), kit.Dir("sys", 0o555), kit.Dir("dev", 0o755), kit.Dir("own", 0o755), kit.File("own/name", 0o644, of+"\n"))
		}
		s.img, s.sibling, s.layer = f.image(t, name, shared, top(name)), f.image(t, name+"-sibling", shared, top("sibling of "+name)), 1
		s.top = f.row(t, s.sibling, 2).ID
		return
	}
	s.img, s.layer = f.image(t, name, own(name)), 1
	if s.use != "free" {
		s.container = f.start(t, f.pod, s.img, s.use == "running")
	}
}

// affected are the images that have the damaged layer.
func (s *spot) affected() []kit.Pushed {
	if s.use == "shared" {
		return []kit.Pushed{s.img, s.sibling}
	}
	return []kit.Pushed{s.img}
}

// harm damages the layer, and leaves its bytes at no other place than the source.
func (f *field) harm(t *testing.T, s *spot) {
	t.Helper()
	if s.kind == "changed" {
		f.digested(t, s)
	}
	blob := s.img.Layers[s.layer]
	if s.source == "other image" {
		layer := f.layers[s.img.Ref][s.layer]
		layer.Compression = kit.Zstd
		name := s.other()
		other := must[kit.Pushed](t)(f.Push(t.Context(), name, kit.Image{Layers: []kit.Layer{kit.NewLayer(kit.Gzip, kit.File("other", 0o644, name)), layer}}))
		if other.DiffIDs[1] != s.img.DiffIDs[s.layer] || other.Layers[1].Digest == blob.Digest {
			t.Fatalf("%s: the layers are %v and %v", s.name(), other.DiffIDs, s.img.DiffIDs)
		}
		s.elsewhere = other.Layers[1].Digest
		must[string](t)(f.Ctr(t.Context(), "content", "fetch", "--plain-http", other.Ref))
	}
	if s.source == "archive" {
		check(t, f.Registry.WriteArchive(filepath.Join(f.archives, s.name()+".tar"), s.img))
	}
	file := filepath.Join("own", "spare")
	if s.use == "pause" {
		file = "only/in/pause"
	}
	switch s.kind {
	case "removed":
		check(t, os.Remove(f.file(t, s.img, s.layer, file)))
	case "changed":
		rewrite(t, f.file(t, s.img, s.layer, file))
	case "emptied":
		dir := f.file(t, s.img, s.layer, filepath.Dir(file))
		check(t, os.RemoveAll(dir))
	case "lost":
		if s.use == "shared" {
			f.lose(t, s.img, 2)
			f.lose(t, s.sibling, 2)
		}
		f.lose(t, s.img, s.layer)
	}
	if s.flaw != "" {
		blobs[s.flaw](t, f.Blob(blob.Digest))
		if s.source != "registry" {
			check(t, os.Rename(f.Registry.Blob(blob.Digest), filepath.Join(f.aside, blob.Digest.Encoded())))
		}
	}
}

// digested waits until there are content digests of the layer: without them, and without its
// blob, a change of content cannot be found.
func (f *field) digested(t *testing.T, s *spot) {
	t.Helper()
	id := f.row(t, s.img, s.layer).ID
	kittest.WaitFor(t, time.Minute, func() error {
		for _, l := range kittest.Inspect(t, f.Daemon).Layers {
			if l.ID == id && l.Contents != "" {
				return nil
			}
		}
		return fmt.Errorf("%s: layer %d has no content digests", s.name(), id)
	})
}

// other is the name of the other image that has the layer.
func (s *spot) other() string { return "other-" + s.name() }

// restore gives the registry back what it did not have, and takes the archive, or the other
// image, away.
func (f *field) restore(t *testing.T, s *spot) {
	t.Helper()
	d := s.img.Layers[s.layer].Digest
	if err := os.Rename(filepath.Join(f.aside, d.Encoded()), f.Registry.Blob(d)); err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	if s.source == "other image" {
		// The CRI plugin has given it a name of its own, too.
		ref := &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: f.Registry.Ref(s.other())}}
		must[*runtimeapi.RemoveImageResponse](t)(f.CRI.Images.RemoveImage(t.Context(), ref))
		kittest.WaitFor(t, time.Minute, func() error {
			if _, err := os.Stat(f.Blob(s.elsewhere)); !os.IsNotExist(err) {
				return fmt.Errorf("%s: the blob of the other image is there: %v", s.name(), err)
			}
			return nil
		})
	}
	if s.source == "archive" {
		check(t, os.Remove(filepath.Join(f.archives, s.name()+".tar")))
	}
}

// foretold fails the test unless check and repair say of an image what is to be said. Nothing
// is changed.
func (f *field) foretold(t *testing.T, all []*spot) {
	t.Helper()
	var refs []string
	for _, s := range all {
		for _, img := range s.affected() {
			refs = append(refs, img.Ref)
		}
	}
	found, status := f.images(t, "check", append([]string{"--deep"}, refs...)...)
	if broken := slices.ContainsFunc(all, func(s *spot) bool { return s.kind != "blob only" }); (status == 1) != broken || status > 1 {
		t.Errorf("check --images --deep: status %d", status)
	}
	planned, _ := f.images(t, "repair", append([]string{"--deep"}, refs...)...)
	for _, s := range all {
		want := s.want()
		for _, img := range s.affected() {
			if r := found.of(t, img); r.Verdict != want.verdict {
				t.Errorf("%s: %s (%s), want %s", s.name(), r.Verdict, r.Reason, want.verdict)
			}
			r := planned.of(t, img)
			if held := r.Verdict == "in use and broken"; !slices.Equal(r.actions(), want.plan) || (r.Blocked != "") != held {
				t.Errorf("%s: the plan is %q, blocked by %q, want %q: %+v", s.name(), r.actions(), r.Blocked, want.plan, r)
			}
			if r.Verdict == "in use and broken" && len(r.Holders) == 0 {
				t.Errorf("%s: nothing holds it", s.name())
			}
		}
	}
}

// repaired repairs images, and fails the test unless they end as they are to.
func (f *field) repaired(t *testing.T, all []*spot, args ...string) {
	t.Helper()
	for some := range slices.Chunk(all, 4) {
		call := append([]string{"--deep", "--apply"}, args...)
		for _, s := range some {
			for _, img := range s.affected() {
				call = append(call, img.Ref)
			}
		}
		done, _ := f.images(t, "repair", call...)
		for _, s := range some {
			want := s.want()
			for _, img := range s.affected() {
				r := done.of(t, img)
				switch {
				case want.blocked && len(args) == 0:
					if r.Dropped || r.Verdict != "in use and broken" || r.Blocked == "" {
						t.Errorf("%s: dropped %v, %s (done: %s; blocked: %s): it is in use", s.name(), r.Dropped, r.Verdict, r.Done, r.Blocked)
					}
				case want.ends == "dropped":
					if !r.Dropped {
						t.Errorf("%s: not dropped, %s (%s; done: %s; blocked: %s)", s.name(), r.Verdict, r.Reason, r.Done, r.Blocked)
					}
				case !r.Dropped && (s.source == "archive" || s.source == "registry" && want.ends == "ready" && r.Verdict == "ready, content incomplete"):
					// The daemon, which has healed the layer, may be bringing the blob by itself.
					kittest.WaitFor(t, time.Minute, func() error {
						found, _ := f.images(t, "check", "--deep", img.Ref)
						if r := found.of(t, img); r.Verdict != "ready" {
							return fmt.Errorf("%s: %s (%s)", s.name(), r.Verdict, r.Reason)
						}
						return nil
					})
				case r.Dropped || r.Verdict != want.ends && r.Verdict != "ready":
					t.Errorf("%s: dropped %v, %s (%s; done: %s; blocked: %s), want %s", s.name(), r.Dropped, r.Verdict, r.Reason, r.Done, r.Blocked, want.ends)
				}
			}
		}
	}
}

// usable fails the test unless each image runs, after a pull of what was dropped, and is ready.
func (f *field) usable(t *testing.T, all []*spot) {
	t.Helper()
	for _, s := range all {
		f.restore(t, s)
		for _, img := range s.affected() {
			if s.want().ends == "ready, content incomplete" {
				must[string](t)(f.Ctr(t.Context(), "content", "fetch", "--plain-http", img.Ref))
			}
			if s.use == "pause" {
				continue // the CRI plugin pulls it by itself
			}
			check(t, f.CRI.WaitKnown(t.Context(), img.Ref, s.want().ends != "dropped"))
			check(t, f.CRI.Pull(t.Context(), img.Ref))
			f.runs(t, f.pod, img)
		}
		if s.use == "shared" && s.kind != "lost" && s.want().ends != "dropped" {
			if now := f.row(t, s.sibling, 2).ID; now != s.top {
				t.Errorf("%s: the own layer of the healthy image is %d, was %d", s.name(), now, s.top)
			}
		}
	}
	var refs []string
	for _, s := range all {
		for _, img := range s.affected() {
			refs = append(refs, img.Ref)
		}
	}
	found, _ := f.images(t, "check", append([]string{"--deep"}, refs...)...)
	for _, r := range found {
		if r.Verdict != "ready" {
			t.Errorf("%s, at the end: %s (%s)", r.Image, r.Verdict, r.Reason)
		}
	}
}

// undisturbed fails the test unless all containers that ran do.
func (f *field) undisturbed(t *testing.T, all []*spot) {
	t.Helper()
	for _, s := range all {
		if s.use == "running" && !must[bool](t)(f.pod.Running(t.Context(), s.container)) {
			t.Errorf("%s: the container does not run any more", s.name())
		}
	}
}

// TestMatrix: each kind of damage of a layer, with its bytes at one place only or nowhere, in an
// image that is free, in use, on a base that a healthy image has, too, or that of all sandboxes,
// on one node. The verdict and the plan are right, and repair --apply ends in an image that is
// ready, or, when its bytes are nowhere, in a clean pull. An image that nothing has happened to
// stays as it is, and so do all containers that run. The pause image has one damage after another.
func TestMatrix(t *testing.T) {
	t.Parallel()
	f := newField(t)
	healthy := f.pull(t, "healthy")
	witness := &spot{use: "running", img: healthy, container: f.start(t, f.pod, healthy, true)}
	before := f.trees(t, healthy)
	all := spots(*everything)
	var side, alone []*spot
	for _, s := range all {
		if s.use == "pause" {
			alone = append(alone, s)
		} else {
			side = append(side, s)
		}
		f.make(t, s)
	}
	t.Logf("%d combinations", len(all))
	for _, s := range side {
		f.harm(t, s)
	}
	f.foretold(t, side)
	f.repaired(t, side)
	f.undisturbed(t, append(side, witness))
	t.Log("repaired")
	f.released(t, side)
	f.usable(t, side)
	t.Log("usable")
	for _, s := range alone {
		f.harm(t, s)
		f.foretold(t, []*spot{s})
		f.repaired(t, []*spot{s})
		if s.want().blocked {
			check(t, f.pod.Remove(t.Context()))
			f.repaired(t, []*spot{s}, "--force")
			f.restore(t, s)
			f.pod = must[*kit.Pod](t)(f.CRI.StartPod(t.Context())) // the CRI plugin pulls the image by itself
			witness.container = f.start(t, f.pod, healthy, true)
		}
		f.usable(t, []*spot{s})
		f.undisturbed(t, []*spot{witness})
	}
	f.runs(t, f.pod, healthy)
	for i, tree := range f.trees(t, healthy) {
		if d := kit.Diff(before[i], tree, 5); d != "" {
			t.Errorf("layer %d of the image that nothing has happened to:\n%s", i, d)
		}
	}
	kittest.NoPanic(t, must[string](t)(f.Daemon.Log()))
	t.Log("\n" + table(all))
}

// released ends the containers without which what is broken can be dropped.
func (f *field) released(t *testing.T, all []*spot) {
	t.Helper()
	var held []*spot
	for _, s := range all {
		if !s.want().blocked {
			continue
		}
		held = append(held, s)
		if s.use == "running" {
			check(t, f.pod.RemoveContainer(t.Context(), s.container))
		}
	}
	if len(held) > 0 {
		f.repaired(t, held, "--force")
	}
}

// table shows what was covered.
func table(all []*spot) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%-10s %-12s", "damage", "bytes in")
	for _, u := range uses {
		fmt.Fprintf(&b, " %-26s", u)
	}
	for _, k := range kinds {
		for _, f := range sources {
			fmt.Fprintf(&b, "\n%-10s %-12s", k, f)
			for _, u := range uses {
				s := &spot{kind: k, source: f, use: u}
				text := "."
				switch {
				case !s.possible():
					text = "impossible"
				case slices.ContainsFunc(all, func(a *spot) bool { return a.name() == s.name() }):
					text = s.want().ends
				}
				fmt.Fprintf(&b, " %-26s", text)
			}
		}
	}
	return b.String()
}
