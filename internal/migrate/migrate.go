// Package migrate moves the images of a node from one snapshotter of containerd's to another,
// without a registry and under running containers: it unpacks them from the blobs that are
// there, and later lets go of the old snapshots.
package migrate

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/internal/images"
	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
)

// State is what has become of an image.
type State string

const (
	// Ready: the new snapshotter has it.
	Ready State = "ready"
	// NeedsPull: it cannot be unpacked from what is on the node.
	NeedsPull State = "needs a pull"
	// Left: the new snapshotter has it, and the old snapshots are still kept.
	Left State = "ready, old snapshots kept"
	// Unknown: containerd, or the snapshotter, gave no answer.
	Unknown State = "not known"
)

// Result is what was done about an image.
type Result struct {
	Image     string `json:"image"`
	Namespace string `json:"namespace"`
	Platform  string `json:"platform,omitempty"`
	State     State  `json:"state"`
	Reason    string `json:"reason,omitempty"`
	Unpacked  bool   `json:"unpacked,omitempty"` // by this call
	// Old are other snapshotters that containerd keeps snapshots of the image in.
	Old []string `json:"old,omitempty"`
	// Containers stand on the old snapshots: they keep them until they are removed.
	Containers []string `json:"containers,omitempty"`
}

// Mover moves images.
type Mover struct {
	conn *repull.Containerd
	ours string // the name of this snapshotter at containerd
	to   string
}

// New returns a Mover to a snapshotter; ours is the name of this one.
func New(conn *repull.Containerd, ours, to string) *Mover { return &Mover{conn, ours, to} }

// Unpack unpacks those of the images that the new snapshotter does not have, the pinned ones
// first. progress is called after each, with how many are done. The error is that of ctx; what
// keeps an image from being unpacked is its reason.
func (m *Mover) Unpack(ctx context.Context, c *images.Checker, found []images.Image, progress func(done, total int)) ([]Result, error) {
	pinned, err := images.Pinned(ctx, m.conn)
	if err != nil {
		return nil, err
	}
	found = slices.Clone(found)
	slices.SortStableFunc(found, func(a, b images.Image) int { return rank(pinned, a) - rank(pinned, b) })
	results := []Result{}
	for n, i := range found {
		r, err := m.unpack(ctx, c, i)
		if err != nil {
			return results, err
		}
		results = append(results, r)
		if progress != nil {
			progress(n+1, len(found))
		}
	}
	return results, nil
}

func rank(pinned []string, i images.Image) int {
	if slices.ContainsFunc(i.Names, func(name string) bool { return slices.Contains(pinned, name) }) {
		return 0
	}
	return 1
}

func (m *Mover) unpack(ctx context.Context, c *images.Checker, i images.Image) (Result, error) {
	r := Result{Image: i.Name, Namespace: i.Namespace, Platform: i.Platform}
	here, err := m.has(ctx, i)
	switch {
	case ctx.Err() != nil:
		return r, ctx.Err()
	case err != nil:
		r.State, r.Reason = Unknown, err.Error()
		return r, nil
	case !here && (i.Verdict == images.Unknown || i.Verdict == images.Pulling):
		r.State, r.Reason = Unknown, i.Reason
		return r, nil
	case !here:
		if err := c.Unpack(ctx, i, m.to); err != nil {
			if ctx.Err() != nil {
				return r, ctx.Err()
			}
			r.State, r.Reason = NeedsPull, err.Error()
			return r, nil
		}
		r.Unpacked = true
	}
	r.State = Ready
	switch {
	case m.to != m.ours || r.Unpacked: // the verdict is of before
	case i.Verdict.Bad():
		r.State, r.Reason = NeedsPull, i.Reason // its layers are here, and not whole
	case !runs(i):
		r.State, r.Reason = Unknown, i.Reason
	}
	return r, m.old(ctx, i, &r)
}

// runs reports whether this snapshotter has verified all layers of an image, and found them whole.
func runs(i images.Image) bool { return i.Verdict == images.Ready || i.Verdict == images.Incomplete }

// has reports whether the new snapshotter has all of an image.
func (m *Mover) has(ctx context.Context, i images.Image) (bool, error) {
	chain := i.Chain()
	if len(chain) == 0 {
		return false, nil
	}
	_, err := m.conn.View().Snapshotter(m.to).Usage(namespaces.WithNamespace(ctx, i.Namespace), chain[len(chain)-1])
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("snapshotter %s: %w", m.to, err)
	}
	return i.Unpacked()[m.to] != "", nil
}

// old adds to a result what is left of the image in other snapshotters. The error is that of ctx.
func (m *Mover) old(ctx context.Context, i images.Image, r *Result) error {
	for name, top := range i.Unpacked() {
		if name == m.to {
			continue
		}
		ctx := namespaces.WithNamespace(ctx, i.Namespace)
		if _, err := m.conn.View().Snapshotter(name).Usage(ctx, top); err != nil {
			continue // only the label is left
		}
		r.Old = append(r.Old, name)
		containers, err := m.conn.View().Containers(ctx, name)
		if err != nil {
			return err
		}
		for _, c := range containers {
			if slices.Contains(i.Names, c.Image) {
				r.Containers = append(r.Containers, c.String())
			}
		}
	}
	slices.Sort(r.Old)
	if len(r.Old) > 0 && r.State == Ready {
		r.State = Left
	}
	return ctx.Err()
}

// Finish lets go of the snapshots of images in other snapshotters, of those images that the new one has:
// containerd collects them, but for those that containers stand on. It returns how many
// images that were.
func (m *Mover) Finish(ctx context.Context, found []images.Image) (n int, err error) {
	touched := map[string]bool{}
	for _, i := range found {
		here, err := m.has(ctx, i)
		if err != nil {
			return n, err
		}
		if !here || m.to == m.ours && !runs(i) {
			continue
		}
		labels, paths := map[string]string{}, []string{}
		for name := range i.Unpacked() {
			if name != m.to {
				labels[snapshotLabel+name] = ""
				paths = append(paths, "labels."+snapshotLabel+name)
				touched[name] = true
			}
		}
		if len(paths) == 0 {
			continue
		}
		if _, err := m.conn.View().Content().Update(namespaces.WithNamespace(ctx, i.Namespace), content.Info{Digest: i.Config(), Labels: labels}, paths...); err != nil {
			return n, fmt.Errorf("image %s: %w", i.Name, err)
		}
		n++
	}
	for name := range touched {
		if err := m.conn.Collect(ctx, name); err != nil {
			return n, fmt.Errorf("collect the snapshots of %s: %w", name, err)
		}
	}
	return n, nil
}

// snapshotLabel begins the labels of a config that keep its snapshots (containerd's
// core/metadata/gc.go:74). The snapshotter follows.
const snapshotLabel = "containerd.io/gc.ref.snapshot."

// Text is a result in one line.
func (r Result) Text() string {
	parts := []string{r.Reason}
	if r.Unpacked {
		parts = append(parts, "unpacked")
	}
	if len(r.Old) > 0 {
		parts = append(parts, "also in "+strings.Join(r.Old, ", "))
	}
	if len(r.Containers) > 0 {
		parts = append(parts, fmt.Sprintf("held there by %s", strings.Join(r.Containers[:min(3, len(r.Containers))], ", ")))
	}
	return strings.Join(slices.DeleteFunc(parts, func(s string) bool { return s == "" }), "; ")
}
