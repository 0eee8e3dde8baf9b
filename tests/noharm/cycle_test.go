package noharm

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
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

// event is something that happens to a node and does no harm to any layer.
type event struct {
	name  string
	fs    []string // file systems where it is possible; all when empty
	blobs bool     // it is about the blobs of the layers
	// always: the other events of the cycle only happen together with it.
	always bool
	// do makes it happen; what it returns, if not nil, ends it.
	do func(t testing.TB, n *node) (undo func())
}

// cycle is one round in the life of a node: some events, and everything that
// could take them for damage.
type cycle struct {
	name string
	// state of the node while the events happen.
	state state
	// allow is what may be reported until the events are over. Afterwards all
	// layers are ready, in any case.
	allow  allowed
	events []event
}

type state int

const (
	running state = iota // all goes on
	halted               // daemon and containerd were killed; the container goes on
	unused               // the container was removed, too, and the disk can be unmounted
)

// allowed orders what may be reported.
type allowed int

const (
	nothing allowed = iota // all layers are ready, and every call succeeds
	doubt                  // calls fail, layers are not verified
	damage                 // layers are called damaged
)

// problems are what a cycle has done wrong.
type problems []string

func (p *problems) add(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if len(text) > 600 {
		text = text[:600] + "…"
	}
	if !slices.Contains(*p, text) {
		*p = append(*p, text)
	}
}

func (p *problems) unless(err error) {
	if err != nil {
		p.add("%v", err)
	}
}

// live runs a cycle: the events, everything that could react, the end of the
// events, and everything once more.
func (n *node) live(t testing.TB, c cycle) (found problems) {
	t.Helper()
	n.mark = len(must[string](t)(n.Daemon.Log()))
	if n.witness == nil {
		n.use(t)
	}
	switch c.state {
	case halted:
		n.halt(t)
	case unused:
		n.unuse(t)
		n.halt(t)
	}
	var undo []func()
	over := func() {
		for _, u := range slices.Backward(undo) {
			u()
		}
		undo = nil
	}
	defer over() // when the test ends in the middle
	for _, e := range c.events {
		if u := e.do(t, n); u != nil {
			undo = append(undo, u)
		}
	}
	if c.state != running {
		over()
		n.boot(t)
		if c.state == unused {
			n.use(t)
		}
	} else {
		n.provoke(t, &found, c.allow)
		over()
	}
	if c.state != running || c.allow > nothing {
		n.recovers(t, &found)
		n.provoke(t, &found, nothing)
	}
	n.unharmed(t, &found, c.allow)
	return found
}

// provoke has everything verify the layers that can, and the image used.
func (n *node) provoke(t testing.TB, found *problems, allow allowed) {
	t.Helper()
	n.verbs(t, found, allow, allVerbs)
	n.booted(t, found, allow)
	n.verbs(t, found, allow, [][]string{{"check", "--deep"}, {"repair", "--deep", "--apply"}})
	if allow > nothing { // errors are allowed, and the questions are what counts
		if n.down {
			sn := must[snapshots.Snapshotter](t)(n.Daemon.Snapshotter())
			defer sn.Close()
			_ = n.statAll(t, sn)
		} else {
			_ = n.stat(t)
		}
		return
	}
	found.unless(n.stat(t))
	found.unless(n.scrubbed(t))
	found.unless(n.startsAnew(t))
}

// allVerbs are those that verify layers, in all their depths.
var allVerbs = [][]string{{"check"}, {"check", "--deep"}, {"repair"}, {"repair", "--apply"}, {"repair", "--deep", "--apply"}}

// verbs has verbs verify and repair all layers.
func (n *node) verbs(t testing.TB, found *problems, allow allowed, verbs [][]string) {
	t.Helper()
	for _, args := range verbs {
		all, err := n.results(t, args...)
		for _, r := range all {
			n.judge(found, strings.Join(args, " "), r, allow)
		}
		if allow == nothing {
			found.unless(err)
		}
	}
}

// judge evaluates one result of one verb.
func (n *node) judge(found *problems, what string, r kit.Verdict, allow allowed) {
	if !slices.Contains(n.ids, r.ID) {
		return
	}
	switch {
	case r.Healed:
		found.add("%s: replaced: %v", what, r)
	case (r.State == "damaged" || r.State == "healing") && allow < damage, // healing: its blobs are tried
		r.State != "ready" && allow == nothing:
		found.add("%s: %v", what, r)
	}
}

// booted cuts the power of daemon and containerd and waits until all layers were
// verified, which the daemon begins by itself.
func (n *node) booted(t testing.TB, found *problems, allow allowed) {
	t.Helper()
	n.halt(t)
	n.boot(t)
	if allow > nothing {
		return
	}
	found.unless(n.ready(t, time.Minute))
	found.unless(n.listed(t))
}

// ready waits until the daemon reports all layers as ready. One that is called
// damaged is an error at once.
func (n *node) ready(t testing.TB, limit time.Duration) (err error) {
	t.Helper()
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		r, err2 := n.Daemon.Inspect(t.Context())
		if err2 != nil {
			return err2
		}
		err = nil
		for _, l := range r.Layers {
			if !slices.Contains(n.ids, l.ID) || l.State == "ready" {
				continue
			}
			if err = errors.New(l.String()); l.State == "damaged" {
				return err
			}
		}
		if err == nil {
			return nil
		}
	}
	return fmt.Errorf("after %v: %w", limit, err)
}

// scrubbed waits until a round of verification has begun and ended.
func (n *node) scrubbed(t testing.TB) error {
	t.Helper()
	first, err := n.Daemon.Inspect(t.Context())
	if err != nil {
		return err
	}
	last := first
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if last, err = n.Daemon.Inspect(t.Context()); err != nil {
			return err
		}
		s := last.Journal.Scrub
		if !s.Started.Equal(first.Journal.Scrub.Started) && !s.Finished.IsZero() {
			if s.Damaged > 0 {
				return fmt.Errorf("a scrub has found %d damaged layers", s.Damaged)
			}
			return nil
		}
	}
	return fmt.Errorf("no round of scrubbing in a minute: %+v", last.Journal.Scrub)
}

// recovers waits until all layers are ready although they were doubted, or called
// damaged: the daemon verifies again by itself what it could not heal. The use of
// the image is what makes it.
func (n *node) recovers(t testing.TB, found *problems) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		if err = n.stat(t); err == nil {
			break
		}
	}
	found.unless(err)
	found.unless(n.listed(t))
}

// unharmed is the verdict: nothing was replaced, dropped, or disturbed.
func (n *node) unharmed(t testing.TB, found *problems, allow allowed) {
	t.Helper()
	now, err := n.directories()
	found.unless(err)
	if err == nil && !maps.Equal(now, n.inodes) {
		found.add("directories of layers were replaced: inodes %v, were %v", now, n.inodes)
	}
	for _, dir := range []string{"replaced", "healing"} {
		entries, err := os.ReadDir(filepath.Join(n.Daemon.Root, dir))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		for _, e := range entries {
			found.add("%s/%s: a tree was replaced", dir, e.Name())
		}
	}
	r, err := n.Daemon.Inspect(t.Context())
	found.unless(err)
	for i, name := range n.names {
		at := slices.IndexFunc(r.Layers, func(l kit.Verdict) bool { return l.Name == name })
		switch {
		case at < 0:
			found.add("the snapshot %s was removed", name)
		case r.Layers[at].ID != n.ids[i] || r.Layers[at].State != "ready":
			found.add("in the end, %v", r.Layers[at])
		}
	}
	found.unless(n.listed(t))
	blobs := n.blobsOf(t)
	for _, d := range n.content {
		if !slices.Contains(blobs, d) {
			found.add("the blob %s was removed", d)
		}
	}
	found.unless(n.witness.undisturbed())
	for line := range strings.Lines(n.daemonLog(t)) {
		if text := suspicious(line, allow); text != "" {
			found.add("the daemon logs: %s", text)
		}
	}
}

var (
	logsMending = regexp.MustCompile(`extracted again from its blob|dropped \d+ image|layer_healed|image_dropped`)
	logsDamage  = regexp.MustCompile(`layer is damaged|layer_damaged`)
)

// suspicious returns what a line of the daemon's log reports of damage, a healing,
// or a drop.
func suspicious(line string, allow allowed) string {
	var l struct{ Msg, Event string }
	if json.Unmarshal([]byte(line), &l) != nil {
		return ""
	}
	text := strings.ToLower(l.Msg + " " + l.Event)
	if logsMending.MatchString(text) || allow < damage && logsDamage.MatchString(text) {
		return line
	}
	return ""
}

// client is a connection to the daemon that was made before an event.
func (n *node) client(t testing.TB) snapshots.Snapshotter {
	t.Helper()
	sn := must[snapshots.Snapshotter](t)(n.Daemon.Snapshotter())
	t.Cleanup(func() { sn.Close() })
	return sn
}

// possible reports whether an event can happen on a node.
func (e event) possible(fs string, blobs bool) bool {
	return (len(e.fs) == 0 || slices.Contains(e.fs, fs)) && (blobs || !e.blobs)
}

// TestNoHarm runs all events on nodes with and without blobs, on each file system; of
// these six, make test has three, and of the cycles on btrfs half, and what only that can
// do. Events of a cycle happen together; when that is not
// without problems, each is tried alone, on a node of its own, so that those that are
// reported are those at fault.
func TestNoHarm(t *testing.T) {
	for _, fs := range []string{"ext4", "xfs", "btrfs"} {
		for _, blobs := range []bool{true, false} {
			if !kittest.Every() && blobs == (fs == "xfs") {
				continue
			}
			t.Run(fs+map[bool]string{true: ",blobs", false: ",no-blobs"}[blobs], func(t *testing.T) {
				t.Parallel()
				runAll(t, fs, blobs)
			})
		}
	}
}

func runAll(t *testing.T, fs string, blobs bool) {
	n := newNode(t, fs, nodeOptions{blobs: blobs})
	for i, c := range cycles {
		own := slices.ContainsFunc(c.events, func(e event) bool { return slices.Contains(e.fs, fs) })
		if fs == "btrfs" && *only == "" && !own && !kittest.Turn(i, 2) {
			continue
		}
		c.events = slices.DeleteFunc(slices.Clone(c.events), func(e event) bool { return !e.possible(fs, blobs) || !e.always && !selected(e) })
		if !slices.ContainsFunc(c.events, selected) {
			continue
		}
		began := time.Now()
		found := n.live(t, c)
		t.Logf("%s: %v, %d problems", c.name, time.Since(began).Round(100*time.Millisecond), len(found))
		blame(t, fs, blobs, c, found)
		if len(found) > 0 {
			n.end(t)
			n = newNode(t, fs, nodeOptions{blobs: blobs})
		}
	}
}

// blame reports on each event of a cycle in which problems were found.
func blame(t *testing.T, fs string, blobs bool, c cycle, found problems) {
	alone := 0
	for _, e := range c.events {
		t.Run(e.name, func(t *testing.T) {
			if len(found) == 0 || *together {
				return
			}
			own := found
			if len(c.events) > 1 {
				one := c
				one.events = slices.DeleteFunc(slices.Clone(c.events), func(o event) bool { return !o.always && o.name != e.name })
				own = newNode(t, fs, nodeOptions{blobs: blobs}).live(t, one)
			}
			for _, p := range own {
				t.Error(p)
			}
			if len(own) > 0 {
				alone++
			}
		})
	}
	if len(found) > 0 && alone == 0 {
		t.Errorf("the events of the cycle %q do harm together:\n%s", c.name, strings.Join(found, "\n"))
	}
}
