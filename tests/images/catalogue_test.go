package images

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// cell is one damage of one image.
type cell struct {
	damage, blob, use string
	img               kit.Pushed
	container         string // of use
}

func (c *cell) name() string { return strings.ReplaceAll(c.damage+"-"+c.blob+"-"+c.use, " ", "") }

// damages of the top layer of an image, by what becomes of its tree.
var damages = map[string]func(*testing.T, *node, kit.Pushed){
	"none":    func(*testing.T, *node, kit.Pushed) {},
	"removed": func(t *testing.T, n *node, img kit.Pushed) { check(t, os.Remove(n.file(t, img, 1, "own/spare"))) },
	"changed": func(t *testing.T, n *node, img kit.Pushed) { rewrite(t, n.file(t, img, 1, "own/spare")) },
	"lost":    func(t *testing.T, n *node, img kit.Pushed) { n.lose(t, img, 1) },
}

// blobs are what becomes of the blob of that layer.
var blobs = map[string]func(*testing.T, string){
	"good":    func(*testing.T, string) {},
	"missing": func(t *testing.T, file string) { check(t, os.Remove(file)) },
	"short":   func(t *testing.T, file string) { check(t, os.Truncate(file, 20)) },
	"corrupt": rewrite,
}

// cells are the catalogue. A lost layer cannot be in use.
func cells() (all []*cell) {
	for _, damage := range []string{"removed", "changed"} {
		for _, blob := range []string{"good", "missing", "corrupt"} {
			for _, use := range []string{"free", "exited", "running"} {
				all = append(all, &cell{damage: damage, blob: blob, use: use})
			}
		}
	}
	for _, blob := range []string{"good", "missing", "corrupt"} {
		all = append(all, &cell{damage: "lost", blob: blob, use: "free"})
	}
	for _, blob := range []string{"good", "missing", "short", "corrupt"} {
		all = append(all, &cell{damage: "none", blob: blob, use: "running"})
	}
	var some []*cell
	for i, c := range all {
		if kittest.Turn(i, 4) {
			some = append(some, c)
		}
	}
	return some
}

// verdict is what is to be found, with the actions of the plan and the rest of what blocks it.
func (c *cell) verdict() (verdict string, plan []string, blocked string) {
	damaged := c.damage == "removed" || c.damage == "changed"
	switch {
	case c.damage == "none" && c.blob == "good":
		return "ready", nil, ""
	case c.damage == "none":
		return "ready, content incomplete", []string{"drop blobs"}, ""
	case damaged && c.blob == "good":
		return "healable", []string{"heal"}, ""
	case damaged && c.use == "free":
		return "needs fetch", []string{"heal", "drop layer"}, ""
	case damaged && c.use == "exited":
		return "in use and broken", []string{"heal", "drop blobs"}, "--force removes their snapshots"
	case damaged:
		return "in use and broken", []string{"heal", "drop blobs"}, "content fetch"
	case c.blob == "good":
		return "healable", []string{"unpack"}, ""
	}
	return "needs fetch", []string{"drop layer"}, ""
}

// TestCatalogue: every damage at once, on one node; the verdicts, the plans, and what repair
// makes of them. The base of all images, an image that nothing has happened to, and its
// container stay as they are.
func TestCatalogue(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	t.Log("the node runs")
	healthy := n.pull(t, "healthy")
	p := must[*kit.Pod](t)(n.CRI.StartPod(t.Context()))
	t.Cleanup(func() { _ = p.Remove(context.Background()) })
	witness := n.start(t, p, healthy, true)
	before := n.trees(t, healthy)
	all := cells()
	for _, c := range all {
		c.img = n.pull(t, c.name())
		if c.use != "free" {
			c.container = n.start(t, p, c.img, c.use == "running")
		}
	}
	t.Logf("%d images are pulled", len(all))
	n.digested(t, 4+len(all))
	t.Log("all layers have content digests")
	if found, status := n.images(t, "check"); status != 0 {
		t.Fatalf("status %d before any damage: %+v", status, found)
	}
	for _, c := range all {
		damages[c.damage](t, n, c.img)
		blobs[c.blob](t, n.Blob(c.img.Layers[1].Digest))
	}

	n.wantVerdicts(t, all)
	t.Log("verdicts")
	n.wantPlans(t, all)
	t.Log("plans")
	n.wantRepaired(t, all)
	t.Log("repair --apply")
	n.wantForced(t, all)
	t.Log("repair --apply --force")
	n.wantClean(t, p, all)
	t.Log("pulled and fetched")

	n.runs(t, p, healthy)
	for i, tree := range n.trees(t, healthy) {
		if d := kit.Diff(before[i], tree, 5); d != "" {
			t.Errorf("layer %d of the image that nothing has happened to:\n%s", i, d)
		}
	}
	check(t, p.RemoveContainer(t.Context(), witness))
	kittest.NoPanic(t, must[string](t)(n.Daemon.Log()))
}

// start starts a container, which goes on or ends.
func (n *node) start(t *testing.T, p *kit.Pod, img kit.Pushed, goesOn bool) string {
	t.Helper()
	command := []string{"/bin/guest", "echo", "done"}
	if goesOn {
		command = []string{"/bin/guest", "wait"}
	}
	id := must[string](t)(p.Create(t.Context(), img.Ref, command...))
	check(t, p.Start(t.Context(), id))
	if !goesOn {
		must[int32](t)(p.Wait(t.Context(), id))
	}
	return id
}

// digested waits until there are content digests of all layers: before, a change of content
// may be taken for what was committed.
func (n *node) digested(t *testing.T, layers int) {
	t.Helper()
	kittest.WaitFor(t, 60e9, func() error {
		have := 0
		for _, l := range kittest.Inspect(t, n.Daemon).Layers {
			if l.Contents != "" {
				have++
			}
		}
		if have < layers {
			return fmt.Errorf("%d of %d layers have content digests", have, layers)
		}
		return nil
	})
}

func (n *node) wantVerdicts(t *testing.T, all []*cell) {
	t.Helper()
	found, status := n.images(t, "check", "--deep")
	if status != 1 {
		t.Errorf("check --images --deep: status %d, want 1", status)
	}
	for _, c := range all {
		r := found.of(t, c.img)
		want, _, _ := c.verdict()
		if r.Verdict != want {
			t.Errorf("%s: %s (%s), want %s", c.name(), r.Verdict, r.Reason, want)
		}
		if r.Platform != "linux/amd64" && r.Platform != "linux/arm64" {
			t.Errorf("%s: platform %q", c.name(), r.Platform)
		}
		switch {
		case c.blob != "good" && (r.Fetch == nil || r.Fetch.Bytes != c.img.Layers[1].Size || len(r.Fetch.From) == 0 || !strings.HasPrefix(c.img.Ref, r.Fetch.From[0])):
			t.Errorf("%s: to fetch: %+v, want %d bytes from the registry", c.name(), r.Fetch, c.img.Layers[1].Size)
		case c.blob == "good" && r.Fetch != nil:
			t.Errorf("%s: to fetch: %+v", c.name(), r.Fetch)
		}
		if broken := want == "healable" || want == "in use and broken"; broken && c.container != "" &&
			(len(r.Holders) != 1 || r.Holders[0].Exited != (c.use == "exited") || !strings.Contains(r.Holders[0].Text, c.container)) {
			t.Errorf("%s: held by %+v, want container %s", c.name(), r.Holders, c.container)
		}
	}
	if len(found) != len(all)+2 {
		t.Errorf("%d images, want one for each of %d", len(found), len(all)+2)
	}
	// Without --deep, what has kept its size is not found.
	found, _ = n.images(t, "check")
	for _, c := range all {
		want, _, _ := c.verdict()
		switch {
		case c.damage == "changed" && c.blob == "missing", c.damage == "none" && c.blob == "missing":
			want = "ready, content incomplete"
		case c.damage == "changed", c.damage == "none" && c.blob == "corrupt":
			want = "ready"
		}
		if r := found.of(t, c.img); r.Verdict != want {
			t.Errorf("%s, not deep: %s (%s), want %s", c.name(), r.Verdict, r.Reason, want)
		}
	}
}

func (n *node) wantPlans(t *testing.T, all []*cell) {
	t.Helper()
	planned, status := n.images(t, "repair", "--deep")
	if status != 1 {
		t.Errorf("repair --images: status %d, want 1", status)
	}
	for _, c := range all {
		verdict, plan, blocked := c.verdict()
		if verdict == "ready" {
			continue
		}
		r := planned.of(t, c.img)
		if !slices.Equal(r.actions(), plan) {
			t.Errorf("%s: the plan is %q, want %q: %+v", c.name(), r.actions(), plan, r)
		}
		if (r.Blocked == "") != (blocked == "") || !strings.Contains(r.Blocked, blocked) {
			t.Errorf("%s: blocked by %q, want %q", c.name(), r.Blocked, blocked)
		}
	}
	// Nothing has changed.
	again, _ := n.images(t, "check", "--deep")
	for _, c := range all {
		want, _, _ := c.verdict()
		if r := again.of(t, c.img); r.Verdict != want {
			t.Errorf("%s, after repair without --apply: %s (%s), want %s", c.name(), r.Verdict, r.Reason, want)
		}
	}
}

// repair repairs the images of cells, a few in each call: kit ends a verb that takes minutes. The
// status is the worst.
func (n *node) repair(t *testing.T, all []*cell, args ...string) (done results, worst int) {
	t.Helper()
	for some := range slices.Chunk(all, 5) {
		call := slices.Clone(args)
		for _, c := range some {
			call = append(call, c.img.Ref)
		}
		r, status := n.images(t, "repair", call...)
		done, worst = append(done, r...), max(worst, status)
	}
	return done, worst
}

func (n *node) wantRepaired(t *testing.T, all []*cell) {
	t.Helper()
	repaired, status := n.repair(t, all, "--deep", "--apply")
	if status != 1 {
		t.Errorf("repair --images --apply: status %d, want 1 for the images in use", status)
	}
	for _, c := range all {
		verdict, plan, blocked := c.verdict()
		if verdict == "ready" {
			continue
		}
		r := repaired.of(t, c.img)
		dropped := slices.Contains(plan, "drop layer")
		want := "ready"
		switch {
		case blocked != "":
			want = "in use and broken"
		case c.damage == "none":
			want = "ready, content incomplete"
		}
		if r.Dropped != dropped || !dropped && r.Verdict != want {
			t.Errorf("%s: dropped %v, %s (%s; done: %s; blocked: %s), want %v, %s", c.name(), r.Dropped, r.Verdict, r.Reason, r.Done, r.Blocked, dropped, want)
		}
		if known := must[bool](t)(n.CRI.Known(t.Context(), c.img.Ref)); known == dropped {
			check(t, n.CRI.WaitKnown(t.Context(), c.img.Ref, !dropped))
		}
		if _, err := os.Stat(n.Blob(c.img.Layers[1].Digest)); (err == nil) != (c.blob == "good") {
			t.Errorf("%s: the blob after the repair: %v", c.name(), err)
		}
	}
}

// wantForced: with --force the snapshots of containers that have ended go.
func (n *node) wantForced(t *testing.T, all []*cell) {
	t.Helper()
	held := slices.DeleteFunc(slices.Clone(all), func(c *cell) bool {
		_, _, blocked := c.verdict()
		return blocked == "" // others are dropped already, or ready
	})
	forced, _ := n.repair(t, held, "--deep", "--apply", "--force")
	for _, c := range held {
		r := forced.of(t, c.img)
		if r.Dropped != (c.use == "exited") {
			t.Errorf("%s: dropped %v with --force (%s; done: %s; blocked: %s)", c.name(), r.Dropped, r.Reason, r.Done, r.Blocked)
		}
	}
}

// wantClean: what was dropped can be pulled; what runs is healed after its blob was fetched.
func (n *node) wantClean(t *testing.T, p *kit.Pod, all []*cell) {
	t.Helper()
	for _, c := range all {
		if c.blob != "good" && (c.damage == "none" || c.use == "running") {
			must[string](t)(n.Ctr(t.Context(), "content", "fetch", "--plain-http", c.img.Ref))
			continue
		}
		if known := must[bool](t)(n.CRI.Known(t.Context(), c.img.Ref)); !known {
			check(t, n.CRI.Pull(t.Context(), c.img.Ref))
		}
	}
	if left, status := n.repair(t, all, "--deep", "--apply"); status != 0 {
		t.Errorf("after the blobs were fetched: status %d: %+v", status, left)
	}
	found, status := n.images(t, "check", "--deep")
	if status != 0 {
		t.Errorf("at the end: status %d", status)
	}
	for _, c := range all {
		if r := found.of(t, c.img); r.Verdict != "ready" {
			t.Errorf("%s, at the end: %s (%s)", c.name(), r.Verdict, r.Reason)
		}
		n.runs(t, p, c.img)
		if c.use == "running" {
			check(t, p.RemoveContainer(t.Context(), c.container))
		}
	}
}
