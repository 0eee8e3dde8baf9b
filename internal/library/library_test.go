package library

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

func TestLeadsTo(t *testing.T) {
	digests := map[string]digest.Digest{}
	l := &Library{Blobs: map[digest.Digest]content.Info{}}
	add := func(name string, labels map[string]string) {
		d := digest.FromString(name)
		for label, to := range labels {
			labels[label] = digest.FromString(to).String()
		}
		digests[name], l.Blobs[d] = d, content.Info{Digest: d, Labels: labels}
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
		way, ok := l.LeadsTo(digest.FromString(c.from), to)
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
		labels[fmt.Sprint(refLayer, i)] = digest.FromString(fmt.Sprint("layer", i)).String()
	}
	got := layersOf(content.Info{Labels: labels})
	if len(got) != 12 || got[2] != digest.FromString("layer2") || got[10] != digest.FromString("layer10") {
		t.Errorf("layers in order of their labels, not by number: %v", got)
	}
	labels[refLayer+"3"] = "sha256:917704b6\u02db" // out of a damaged manifest
	if got := layersOf(content.Info{Labels: labels}); got != nil {
		t.Errorf("with a label that is no digest: %v", got)
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
		{fmt.Errorf("blob expected: %w", errdefs.ErrNotFound), Missing},
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

// TestTwice: what the disk could not deliver once is read again.
func TestTwice(t *testing.T) {
	for _, c := range []struct {
		flaws []string
		want  string
		calls int
	}{
		{[]string{unreadable, ""}, "", 2},
		{[]string{unreadable, unreadable}, unreadable, 2},
		{[]string{unreadable, corrupt}, corrupt, 2},
		{[]string{corrupt}, corrupt, 1},
		{[]string{""}, "", 1},
	} {
		calls := 0
		flaw, err := twice(func() (string, error) { calls++; return c.flaws[calls-1], nil })
		if flaw != c.want || err != nil || calls != c.calls {
			t.Errorf("%q: %q, %v after %d calls", c.flaws, flaw, err, calls)
		}
	}
	if _, err := twice(func() (string, error) { return "", unix.ENOMEM }); !errors.Is(err, unix.ENOMEM) {
		t.Error(err)
	}
}
