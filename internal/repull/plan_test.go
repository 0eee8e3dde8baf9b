package repull

import (
	"context"
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
)

// list is the rows of a snapshotter.
type list []snapshots.Info

func (l list) Walk(ctx context.Context, f snapshots.WalkFunc, _ ...string) error {
	for _, info := range l {
		if err := f(ctx, info); err != nil {
			return err
		}
	}
	return nil
}

func TestOnTop(t *testing.T) {
	const committed, active, view = snapshots.KindCommitted, snapshots.KindActive, snapshots.KindView
	all := list{
		{Name: "k8s.io/1/base", Kind: committed},
		{Name: "k8s.io/2/bad", Parent: "k8s.io/1/base", Kind: committed},
		{Name: "k8s.io/3/above/with/slashes", Parent: "k8s.io/2/bad", Kind: committed},
		{Name: "k8s.io/4/container", Parent: "k8s.io/3/above/with/slashes", Kind: active},
		{Name: "k8s.io/5/looking", Parent: "k8s.io/2/bad", Kind: view},
		{Name: "k8s.io/6/beside", Parent: "k8s.io/1/base", Kind: committed},
		{Name: "k8s.io/7/of beside", Parent: "k8s.io/6/beside", Kind: active},
		{Name: "other/8/bad", Kind: committed},
		{Name: "other/9/on the other", Parent: "other/8/bad", Kind: active},
		// The layer pulled again, before the old one was collected.
		{Name: "k8s.io/10/bad", Parent: "k8s.io/1/base", Kind: committed},
		{Name: "k8s.io/11/container of the new", Parent: "k8s.io/10/bad", Kind: active},
		// An active snapshot may have any key, and is no layer.
		{Name: "k8s.io/12/bad", Parent: "k8s.io/1/base", Kind: active},
		{Name: "without-a-namespace", Kind: committed},
	}
	rows, err := readRows(t.Context(), all, "k8s.io")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, r := range onTop(rows, "bad") {
		got = append(got, r.key)
	}
	slices.Sort(got)
	want := []string{"above/with/slashes", "bad", "bad", "container", "container of the new", "looking"}
	if !slices.Equal(got, want) {
		t.Errorf("on top of bad: %q, want %q", got, want)
	}
	if top := onTop(rows, "nobody"); top != nil {
		t.Errorf("on top of what is not there: %v", top)
	}
}
