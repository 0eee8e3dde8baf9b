package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/sockets"
	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
)

func TestMain(m *testing.M) { treetest.Main(m) }

const someDigest = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

// What calls are made with. The first names are valid; the last ones never are.
var (
	fuzzNames = []string{
		"a", "b", "k8s.io/1/" + someDigest, "k8s.io/2/extract-1-x " + someDigest, "default/3/c", "d/./e", " \n\t\u202e", strings.Repeat("n", 2048),
		"", "x/../y", "..", "zero\x00byte", strings.Repeat("n", 2049),
	}
	validNames = 8
	fuzzLabels = []map[string]string{
		nil, {"l": "v"}, {"l": "", "m": strings.Repeat("x", 4000)}, {layout.LabelTarget: someDigest}, {layout.LabelTarget: "../x", layout.LabelDiffID: "y"},
		{"too long": strings.Repeat("x", 4096)},
	}
	validLabels = 5
	fuzzPaths   = [][]string{nil, {"labels"}, {"labels.l"}, {"labels.l", "labels.none"}, {"name"}, {"labels.l", "kind"}}
	validPaths  = 4
)

// row is what the model has of a snapshot.
type row struct {
	kind   snapshots.Kind
	parent string
	labels map[string]string
}

type model map[string]row

// FuzzCalls makes sequences of calls over gRPC, with odd keys, labels, parents and orders,
// on a root on a disk of its own, and compares each answer, and the snapshots that there are
// then, with a simple model. Four bytes are a call.
func FuzzCalls(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x00\x02\x01\x00\x00\x00\x02\x01\x01\x01\x03\x01\x00\x03\x01\x00\x00\x08\x00\x00\x00"))
	f.Add([]byte("\x00\x03\x00\x03\x02\x00\x03\x00\x00\x03\x00\x03\x02\x00\x03\x00\x00\x01\x00\x00\x00\x03\x00\x00\x02\x00\x03\x00\x04\x00\x00\x00"))
	f.Add([]byte("\x00\x00\x00\x00\x05\x00\x02\x01\x05\x00\x05\x04\x06\x00\x00\x00\x07\x00\x00\x00\x09\x00\x00\x00"))
	f.Add([]byte("\x00\x08\x00\x00\x00\x00\x08\x00\x01\x09\x00\x05\x02\x0b\x0c\x00\x03\x0a\x00\x00\x04\x08\x00\x00\x05\x09\x00\x00\x06\x0c\x00\x00\x07\x0b\x00\x00"))
	f.Add([]byte("00000000000028c0zB89zBB0"))
	for seed := range uint64(40) {
		r, calls := rand.New(rand.NewPCG(seed, 0)), make([]byte, 120)
		for i := range calls {
			calls[i] = byte(r.IntN(6)) // few names, so that they meet
			if i%4 == 0 {
				calls[i] = byte(r.IntN(10))
			}
			if i%4 == 2 && calls[i-2] < 2 && r.IntN(2) == 0 {
				calls[i] = 8 // no parent
			}
		}
		f.Add(calls)
	}
	treetest.Check(f, log.SetLevel("fatal"))
	// In memory, because each Commit syncs its file system.
	f.Setenv("TMPDIR", "/dev/shm")
	root := treetest.Formatted(f, "ext4", 64<<20)
	sn := serveFuzz(f, root)
	f.Fuzz(func(t *testing.T, calls []byte) {
		c := caller{T: t, sn: sn, have: model{}}
		c.clear()
		for ; len(calls) >= 4; calls = calls[4:] {
			c.call(calls[0], calls[1], calls[2], calls[3])
			c.compare()
			if t.Failed() {
				return
			}
		}
		c.directories(root)
	})
}

// serveFuzz serves a root, and returns a client of it as containerd has one.
func serveFuzz(f *testing.F, root string) snapshots.Snapshotter {
	sn, err := snapshotter.New(f.Context(), snapshotter.Config{Root: root, JournalHistory: 3})
	treetest.Check(f, err)
	l, err := sockets.Listen(f.Context(), filepath.Join(f.TempDir(), "s"))
	treetest.Check(f, err)
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- serveGRPC(ctx, l, sn, nil, health.NewServer()) }()
	conn, err := grpc.NewClient("unix://"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	treetest.Check(f, err)
	f.Cleanup(func() {
		stop()
		treetest.Check(f, errors.Join(conn.Close(), <-served, sn.Close()))
	})
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "durable")
}

type caller struct {
	*testing.T
	sn   snapshots.Snapshotter
	have model
	log  []string
}

func (c *caller) clear() {
	for range 100 {
		all := c.walk()
		if len(all) == 0 {
			return
		}
		for name := range all {
			_ = c.sn.Remove(c.Context(), name) // refused while others stand on it
		}
	}
	c.Fatal("snapshots cannot be removed")
}

func (c *caller) walk() model {
	c.Helper()
	all := model{}
	treetest.Check(c, c.sn.Walk(c.Context(), func(_ context.Context, info snapshots.Info) error {
		all[info.Name] = row{info.Kind, info.Parent, ownLabels(info.Labels)}
		return nil
	}))
	return all
}

// ownLabels are those that a client has given.
func ownLabels(all map[string]string) map[string]string {
	own := maps.Clone(all)
	maps.DeleteFunc(own, func(k, _ string) bool { return strings.HasPrefix(k, "durable-snapshotter/") })
	return own
}

// call makes one call, and the change that it must make to the model.
func (c *caller) call(what, x, y, z byte) {
	name, other := fuzzNames[int(x)%len(fuzzNames)], fuzzNames[int(y)%len(fuzzNames)]
	goodName, goodOther := slices.Index(fuzzNames, name) < validNames, slices.Index(fuzzNames, other) < validNames
	labels, goodLabels := fuzzLabels[int(z)%len(fuzzLabels)], int(z)%len(fuzzLabels) < validLabels
	with, paths := snapshots.WithLabels(labels), fuzzPaths[int(z>>4)%len(fuzzPaths)]
	have, there := c.have[name]
	c.log = append(c.log, fmt.Sprintf("%d %.40q %.40q %.60q", what%10, name, other, fmt.Sprint(labels)))
	ctx := c.Context()
	switch what % 10 {
	case 0, 1:
		parent, onParent := c.have[other]
		wrong := []error{
			when(!goodName || !goodLabels || other != "" && !goodOther, errdefs.ErrInvalidArgument), when(there, errdefs.ErrAlreadyExists),
			when(other != "" && !onParent, errdefs.ErrNotFound), when(onParent && parent.kind != snapshots.KindCommitted, errdefs.ErrInvalidArgument),
		}
		make, kind := c.sn.Prepare, snapshots.KindActive
		if what%10 == 1 {
			make, kind = c.sn.View, snapshots.KindView
		}
		mounts, err := make(ctx, name, other, with)
		if c.judge(err, wrong...) {
			c.have[name] = row{kind, other, labels}
			if len(mounts) == 0 {
				c.fail("no mounts")
			}
		}
	case 2:
		c.commit(name, other, labels, goodName && goodOther && goodLabels)
	case 3:
		has := slices.ContainsFunc(slices.Collect(maps.Values(c.have)), func(r row) bool { return there && r.parent == name })
		if c.judge(c.sn.Remove(ctx, name), when(!goodName, errdefs.ErrInvalidArgument), when(has, errdefs.ErrFailedPrecondition)) {
			delete(c.have, name)
		}
	case 4:
		info, err := c.sn.Stat(ctx, name)
		if c.judge(err, when(!goodName, errdefs.ErrInvalidArgument), when(!there, errdefs.ErrNotFound)) && info.Kind != have.kind {
			c.fail("kind " + info.Kind.String())
		}
	case 5:
		_, err := c.sn.Update(ctx, snapshots.Info{Name: name, Labels: labels}, paths...)
		badPaths := int(z>>4)%len(fuzzPaths) >= validPaths
		if c.judge(err, when(!goodName || !goodLabels || badPaths, errdefs.ErrInvalidArgument), when(!there, errdefs.ErrNotFound)) {
			c.have[name] = have.updated(labels, paths)
		}
	case 6:
		_, err := c.sn.Usage(ctx, name)
		c.judge(err, when(!goodName, errdefs.ErrInvalidArgument), when(!there, errdefs.ErrNotFound))
	case 7:
		_, err := c.sn.Mounts(ctx, name)
		committed := there && have.kind == snapshots.KindCommitted
		c.judge(err, when(!goodName, errdefs.ErrInvalidArgument), when(!there || committed, errdefs.ErrNotFound), when(committed, errdefs.ErrFailedPrecondition))
	case 8:
		c.judge(c.sn.(snapshots.Cleaner).Cleanup(ctx))
	case 9:
		err := c.sn.Walk(ctx, func(context.Context, snapshots.Info) error { return nil }, other, "name~="+name)
		if err != nil { // a filter need not be one
			c.judge(err, errdefs.ErrInvalidArgument)
		}
	}
}

// commit models a Commit. The name of an extraction may be taken: then what has it stays, or
// goes with all that stands on it.
func (c *caller) commit(name, key string, labels map[string]string, valid bool) {
	_, taken := c.have[name]
	active, there := c.have[key]
	_, extraction := layout.ExtractionOf(key, active.labels)
	settles := taken && there && extraction && active.kind == snapshots.KindActive && c.have[name].kind == snapshots.KindCommitted
	err := c.sn.Commit(c.Context(), name, key, snapshots.WithLabels(labels))
	wrong := []error{
		when(!valid, errdefs.ErrInvalidArgument), when(!there, errdefs.ErrNotFound), when(taken && !settles, errdefs.ErrAlreadyExists),
		when(there && active.kind != snapshots.KindActive, errdefs.ErrFailedPrecondition),
	}
	if settles && c.standsOn(key, name) {
		// What it replaced would be its own parent.
		wrong = append(wrong, errdefs.ErrNotFound)
	}
	if !c.judge(err, wrong...) {
		return
	}
	delete(c.have, key)
	if settles && sameRow(c.have[name], row{snapshots.KindCommitted, active.parent, labels}) && len(c.walk()) == len(c.have) {
		return // it is the same layer, and stays
	}
	if settles {
		for other := range maps.Clone(c.have) {
			if c.standsOn(other, name) {
				defer delete(c.have, other)
			}
		}
	}
	c.have[name] = row{snapshots.KindCommitted, active.parent, labels}
}

func sameRow(a, b row) bool {
	return a.kind == b.kind && a.parent == b.parent && maps.Equal(stored(a.labels), stored(b.labels))
}

// stored are the labels that containerd stores: none without a value
// (core/metadata/boltutil/helpers.go:79).
func stored(all map[string]string) map[string]string {
	all = maps.Clone(all)
	maps.DeleteFunc(all, func(_, value string) bool { return value == "" })
	return all
}

// standsOn reports whether a snapshot has another one below it.
func (c *caller) standsOn(key, name string) bool {
	for at := c.have[key].parent; at != ""; at = c.have[at].parent {
		if at == name {
			return true
		}
	}
	return false
}

func (r row) updated(labels map[string]string, paths []string) row {
	if paths == nil || paths[0] == "labels" {
		r.labels = labels
		return r
	}
	r.labels = maps.Clone(r.labels)
	if r.labels == nil {
		r.labels = map[string]string{}
	}
	for _, p := range paths {
		key := strings.TrimPrefix(p, "labels.")
		r.labels[key] = labels[key]
	}
	return r
}

func when(is bool, err error) error {
	if is {
		return err
	}
	return nil
}

// judge reports whether a call has succeeded. It must when there is no reason against it,
// and else fail with one of the reasons.
func (c *caller) judge(err error, reasons ...error) bool {
	c.Helper()
	reasons = slices.DeleteFunc(reasons, func(r error) bool { return r == nil })
	switch {
	case err == nil && len(reasons) == 0:
		return true
	case err == nil:
		c.fail(fmt.Sprintf("succeeds, in spite of %v", reasons))
	case !slices.ContainsFunc(reasons, func(r error) bool { return errors.Is(err, r) }):
		c.fail(fmt.Sprintf("fails: %v; allowed: %v", err, reasons))
	}
	return false
}

func (c *caller) fail(problem string) {
	c.Helper()
	c.Errorf("%s\nafter %s", problem, strings.Join(c.log, "\n"))
}

func (c *caller) compare() {
	c.Helper()
	is := c.walk()
	for name, want := range c.have {
		if have, ok := is[name]; !ok || !sameRow(have, want) {
			c.fail(fmt.Sprintf("%q is %+v, want %+v", name, have, want))
		}
	}
	if len(is) != len(c.have) {
		c.fail(fmt.Sprintf("%d snapshots, want %d", len(is), len(c.have)))
	}
}

// directories verifies that each row has a directory, and, after a Cleanup, each directory a row.
func (c *caller) directories(root string) {
	treetest.Check(c, c.sn.(snapshots.Cleaner).Cleanup(c.Context()))
	entries, err := os.ReadDir(filepath.Join(root, "snapshots"))
	treetest.Check(c, err)
	n := 0
	for _, e := range entries {
		if _, err := strconv.ParseUint(e.Name(), 10, 64); err == nil {
			n++
		}
	}
	if n != len(c.have) {
		c.fail(fmt.Sprintf("%d directories of %d snapshots", n, len(c.have)))
	}
}
