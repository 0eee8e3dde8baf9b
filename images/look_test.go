package images

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
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
		// An active snapshot may have any key, and is nobody's layer.
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

func TestLeadsTo(t *testing.T) {
	digests := map[string]digest.Digest{}
	l := &library{blobs: map[digest.Digest]content.Info{}}
	add := func(name string, labels map[string]string) {
		d := digest.FromString(name)
		for label, to := range labels {
			labels[label] = digest.FromString(to).String()
		}
		digests[name], l.blobs[d] = d, content.Info{Digest: d, Labels: labels}
	}
	add("manifest", map[string]string{refConfig: "config", refLayer + "0": "layer"})
	add("index", map[string]string{refContent + "m.0": "never fetched", refContent + "m.1": "manifest"})
	add("index of indexes", map[string]string{refContent + "m.0": "index"})
	add("circle", map[string]string{refContent + "m.0": "circle back"})
	add("circle back", map[string]string{refContent + "m.0": "circle"})
	add("only a label", map[string]string{"somebody/ref": "manifest"})
	to := map[digest.Digest]bool{digests["manifest"]: true}
	for _, c := range []struct {
		from string
		way  []string
	}{
		{"manifest", []string{"manifest"}},
		{"index", []string{"manifest", "index"}},
		{"index of indexes", []string{"manifest", "index", "index of indexes"}},
		{"circle", nil},
		{"only a label", nil},
		{"never fetched", nil},
	} {
		way, ok := l.leadsTo(digest.FromString(c.from), to)
		var want []digest.Digest
		for _, name := range c.way {
			want = append(want, digests[name])
		}
		if ok != (c.way != nil) || !slices.Equal(way, want) {
			t.Errorf("%s: %v, %v, want %v", c.from, way, ok, want)
		}
	}
}

func TestLayersOf(t *testing.T) {
	labels := map[string]string{refConfig: "c", refContent + "l.x": "no number"}
	for i := range 12 {
		labels[fmt.Sprint(refLayer, i)] = fmt.Sprint("layer", i)
	}
	got := layersOf(content.Info{Labels: labels})
	if len(got) != 12 || got[2] != "layer2" || got[10] != "layer10" {
		t.Errorf("layers in order of their labels, not by number: %v", got)
	}
	delete(labels, refLayer+"3")
	if got := layersOf(content.Info{Labels: labels}); got != nil {
		t.Errorf("with a gap: %v", got)
	}
}

// TestFlawOf: what is no fault of the blob must not be taken for one, for the blob
// is deleted then.
func TestFlawOf(t *testing.T) {
	for _, c := range []struct {
		err  error
		flaw string
	}{
		{fmt.Errorf("blob expected: %w", errdefs.ErrNotFound), missing},
		{io.ErrUnexpectedEOF, short},
		{errdefs.ErrOutOfRange, short},
		{fmt.Errorf("read /blob: %w", unix.EIO), unreadable},
		{errors.New("rpc: read /blob: " + unix.EUCLEAN.Error()), unreadable},
		{errdefs.ErrUnavailable, ""},
		{context.DeadlineExceeded, ""},
		{unix.EACCES, ""},
		{unix.ENOMEM, ""},
	} {
		if got := flawOf(c.err); got != c.flaw {
			t.Errorf("%v: %q, want %q", c.err, got, c.flaw)
		}
	}
}
