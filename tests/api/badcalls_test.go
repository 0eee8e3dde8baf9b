package api

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// badCall is a call that must fail, in a place where these exist: "base" and
// "top" on it, committed; "active" on top; "view" of top.
type badCall struct {
	name string
	do   func(ctx context.Context, sn snapshots.Snapshotter) error
	want error // the kind; nil when any error will do
	own  bool  // the built-in overlayfs answers otherwise, on purpose
}

func noop(context.Context, snapshots.Info) error { return nil }

func prepare(key, parent string, opts ...snapshots.Opt) func(context.Context, snapshots.Snapshotter) error {
	return func(ctx context.Context, sn snapshots.Snapshotter) error {
		_, err := sn.Prepare(ctx, key, parent, opts...)
		return err
	}
}

func view(key, parent string) func(context.Context, snapshots.Snapshotter) error {
	return func(ctx context.Context, sn snapshots.Snapshotter) error {
		_, err := sn.View(ctx, key, parent)
		return err
	}
}

func commit(name, key string, opts ...snapshots.Opt) func(context.Context, snapshots.Snapshotter) error {
	return func(ctx context.Context, sn snapshots.Snapshotter) error { return sn.Commit(ctx, name, key, opts...) }
}

func remove(key string) func(context.Context, snapshots.Snapshotter) error {
	return func(ctx context.Context, sn snapshots.Snapshotter) error { return sn.Remove(ctx, key) }
}

func update(name string, fields ...string) func(context.Context, snapshots.Snapshotter) error {
	return func(ctx context.Context, sn snapshots.Snapshotter) error {
		_, err := sn.Update(ctx, snapshots.Info{Name: name, Labels: map[string]string{"a": "b"}}, fields...)
		return err
	}
}

func walk(filter string) func(context.Context, snapshots.Snapshotter) error {
	return func(ctx context.Context, sn snapshots.Snapshotter) error { return sn.Walk(ctx, noop, filter) }
}

func badCalls() []badCall {
	calls := []badCall{
		{name: "Prepare on a missing parent", do: prepare("new", "missing"), want: errdefs.ErrNotFound},
		{name: "Prepare on an active parent", do: prepare("new", "active"), want: errdefs.ErrInvalidArgument},
		{name: "Prepare on a view", do: prepare("new", "view"), want: errdefs.ErrInvalidArgument},
		{name: "Prepare with a key in use", do: prepare("active", "top"), want: errdefs.ErrAlreadyExists},
		{name: "Prepare with a committed name", do: prepare("base", ""), want: errdefs.ErrAlreadyExists},
		{name: "View of a missing parent", do: view("new", "missing"), want: errdefs.ErrNotFound},
		{name: "View of an active parent", do: view("new", "active"), want: errdefs.ErrInvalidArgument},
		{name: "View with a key in use", do: view("view", "top"), want: errdefs.ErrAlreadyExists},
		{name: "Commit of a missing key", do: commit("new", "missing"), want: errdefs.ErrNotFound},
		// The built-in one looks up the key first and returns NotFound. That the
		// name is there is the better news for a client that lost the answer.
		{name: "Commit a second time", do: commit("top", "top-key"), want: errdefs.ErrAlreadyExists, own: true},
		{name: "Commit a second time under another name", do: commit("new", "top-key"), want: errdefs.ErrNotFound},
		{name: "Commit to a name in use", do: commit("base", "active"), want: errdefs.ErrAlreadyExists},
		{name: "Commit of a view", do: commit("new", "view"), want: errdefs.ErrFailedPrecondition},
		{name: "Commit of a committed name", do: commit("new", "base"), want: errdefs.ErrFailedPrecondition},
		{name: "Commit with a missing parent", do: commit("new", "loose", snapshots.WithParent("missing")), want: errdefs.ErrNotFound},
		{name: "Commit with an active parent", do: commit("new", "loose", snapshots.WithParent("active")), want: errdefs.ErrFailedPrecondition},
		{name: "Commit with another parent than Prepare's", do: commit("new", "active", snapshots.WithParent("base")), want: errdefs.ErrInvalidArgument},
		{name: "Remove of a parent", do: remove("base"), want: errdefs.ErrFailedPrecondition},
		{name: "Update of a missing name", do: update("missing", "labels.a"), want: errdefs.ErrNotFound},
		{name: "Update of a fixed field", do: update("base", "parent"), want: errdefs.ErrInvalidArgument},
		{name: "Walk with half a filter", do: walk("kind=="), want: errdefs.ErrInvalidArgument},
		{name: "Walk with noise for a filter", do: walk(`name~="[unclosed`), want: errdefs.ErrInvalidArgument},
		{name: "Stat of a missing name", want: errdefs.ErrNotFound, do: func(ctx context.Context, sn snapshots.Snapshotter) error {
			_, err := sn.Stat(ctx, "missing")
			return err
		}},
		{name: "Mounts of a missing key", want: errdefs.ErrNotFound, do: func(ctx context.Context, sn snapshots.Snapshotter) error {
			_, err := sn.Mounts(ctx, "missing")
			return err
		}},
		{name: "Mounts of a committed name", want: errdefs.ErrFailedPrecondition, do: func(ctx context.Context, sn snapshots.Snapshotter) error {
			_, err := sn.Mounts(ctx, "base")
			return err
		}},
		{name: "Usage of a missing name", want: errdefs.ErrNotFound, do: func(ctx context.Context, sn snapshots.Snapshotter) error {
			_, err := sn.Usage(ctx, "missing")
			return err
		}},
		{name: "Prepare with an uid mapping that is none", do: prepare("new", "top", snapshots.WithLabels(map[string]string{
			"containerd.io/snapshot/uidmapping": "zero:to:one", "containerd.io/snapshot/gidmapping": ":::",
		}))},
	}
	many := map[string]string{}
	for n := range 2000 {
		many[fmt.Sprint("label", n)] = "value"
	}
	for what, labels := range map[string]map[string]string{"a label of 8 KiB": {"long": strings.Repeat("v", 8<<10)}, "2,000 labels": many} {
		calls = append(calls,
			badCall{name: "Prepare with " + what, do: prepare("new", "top", snapshots.WithLabels(labels)), want: errdefs.ErrInvalidArgument, own: true},
			badCall{name: "Commit with " + what, do: commit("new", "active", snapshots.WithLabels(labels)), want: errdefs.ErrInvalidArgument, own: true},
			badCall{name: "Update with " + what, want: errdefs.ErrInvalidArgument, own: true, do: func(ctx context.Context, sn snapshots.Snapshotter) error {
				_, err := sn.Update(ctx, snapshots.Info{Name: "base", Labels: labels})
				return err
			}})
	}
	for what, key := range map[string]string{
		"an empty key":          "",
		"the key ..":            "..",
		"a key with ..":         "default/1/../../../escape",
		"a key that ends in ..": "x/..",
		"a key with NUL":        "with\x00nul",
		"a key of 4 KiB":        strings.Repeat("k", 4<<10),
		"a key of 1 MiB":        strings.Repeat("k", 1<<20),
	} {
		calls = append(calls,
			badCall{name: "Prepare with " + what, do: prepare(key, "top"), want: errdefs.ErrInvalidArgument, own: true},
			badCall{name: "View with " + what, do: view(key, "top"), want: errdefs.ErrInvalidArgument, own: true},
			badCall{name: "Commit to " + what, do: commit(key, "active"), want: errdefs.ErrInvalidArgument, own: true})
	}
	return calls
}

// TestBadCalls makes each bad call of the daemon over gRPC, and of containerd's
// own overlayfs: where the two should agree, it is a fact that they do. Then the
// daemon must be as well as before and its surroundings untouched.
func TestBadCalls(t *testing.T) {
	disk := newDisk(t, kit.DiskOptions{})
	d := kittest.StartDaemon(t, kit.DaemonOptions{Dir: disk.Path("durable"), RunDir: scratch(t)})
	sn := kittest.Connect(t, d)
	stock, err := overlay.NewSnapshotter(disk.Path("stock"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := stock.Close(); err != nil {
			t.Error(err)
		}
	})
	setScene(t, sn)
	setScene(t, stock)
	kittest.Check(t, os.WriteFile(disk.Path("neighbour"), []byte("must stay as it is"), 0o644))
	read := func() kit.Tree {
		return kittest.Must[kit.Tree](t)(kit.Fingerprint(disk.Path(), "durable/root", "stock"))
	}
	around, layers := read(), listDir(t, d.Root, "snapshots")

	for _, c := range badCalls() {
		t.Run(c.name, func(t *testing.T) {
			err := c.do(t.Context(), sn)
			if err == nil {
				t.Fatal("succeeded")
			}
			if c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("error %.300v, want %v", err, c.want)
			}
			if c.own || c.want == nil {
				return
			}
			if theirs := c.do(t.Context(), stock); !errors.Is(theirs, c.want) {
				t.Errorf("the built-in overlayfs answers %v, the table has %v", theirs, c.want)
			}
		})
	}

	if diff := kit.Diff(around, read(), 10); diff != "" {
		t.Errorf("what lies around the root changed:\n%s", diff)
	}
	if now := listDir(t, d.Root, "snapshots"); now != layers {
		t.Errorf("directories of snapshots were %s and are %s", layers, now)
	}
	var left []string
	err = sn.Walk(t.Context(), func(_ context.Context, i snapshots.Info) error {
		left = append(left, i.Name)
		return nil
	})
	if err != nil || len(left) != 5 {
		t.Errorf("snapshots after all bad calls: %q, %v", left, err)
	}
	// Removing what is not there succeeds, unlike in the built-in overlayfs: any
	// error but FailedPrecondition stops the sweep of containerd's collector.
	for _, call := range []func(context.Context, snapshots.Snapshotter) error{
		remove("missing"), commit("third", "active"), commit("fourth", "loose", snapshots.WithParent("third")), remove("view"), remove("fourth"), remove("third"),
	} {
		if err := call(t.Context(), sn); err != nil {
			t.Errorf("a good call after the bad ones: %v", err)
		}
	}
	log, err := d.Log()
	if err != nil {
		t.Fatal(err)
	}
	kittest.NoPanic(t, log)
}

// setScene makes the snapshots that badCalls uses.
func setScene(t *testing.T, sn snapshots.Snapshotter) {
	t.Helper()
	for i, call := range []func(context.Context, snapshots.Snapshotter) error{
		prepare("base-key", ""), commit("base", "base-key"),
		prepare("top-key", "base"), commit("top", "top-key"),
		prepare("active", "top"), view("view", "top"), prepare("loose", ""),
	} {
		if err := call(t.Context(), sn); err != nil {
			t.Fatalf("call %d: %v", i, err)
		}
	}
}

func listDir(t *testing.T, names ...string) string {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(names...))
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(entries)
}
