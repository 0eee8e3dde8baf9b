package images

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
	"github.com/durable-snapshotter/durable-snapshotter/internal/refill"
	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
)

// Apply repairs the images that are not ready, and returns what has become of them:
//
//	heal     all damaged layers in place, at once: a layer that images share is healed once
//	examine  every image again; what was healed is ready, and is announced to the CRI plugin
//	act      for each image that is still not ready, the next step of its plan; after a fetch,
//	         also the one that follows
//	examine  again, for the result
//
// Each step examines the image anew, because a step for one image may have repaired another,
// and verifies what it is to remove right before that. An interruption leaves an image that
// is not ready, or one that is not unpacked and was before; a second Apply has the same end.
// In a step, what can be refused comes first, and what leads to the image comes last.
func (c *Checker) Apply(ctx context.Context, found []Image, o RepairOptions) ([]Repair, error) {
	planned, err := c.Plan(ctx, found, o)
	if err != nil || len(planned) == 0 {
		return planned, err
	}
	re := repairer{c}
	healed, err := re.heal(ctx, planned, o)
	if err != nil {
		return nil, err
	}
	for n := range planned {
		if err := re.act(ctx, &planned[n], healed, o); err != nil {
			return nil, err
		}
	}
	return planned, re.announce(ctx, planned)
}

// heal is the first step, for all images together. It returns what was done with each
// layer.
func (c repairer) heal(ctx context.Context, planned []Repair, o RepairOptions) (map[uint64]string, error) {
	deep, shallow := map[uint64]bool{}, map[uint64]bool{}
	for _, r := range planned {
		for _, l := range r.facts.having(LayerDamaged) {
			if l.deep {
				deep[l.ID] = true
			} else {
				shallow[l.ID] = true
			}
		}
	}
	healed := map[uint64]string{}
	for _, part := range []struct {
		ids  map[uint64]bool
		deep bool
	}{{shallow, false}, {deep, true}} {
		if len(part.ids) == 0 {
			continue
		}
		done, err := o.Heal(ctx, slices.Sorted(maps.Keys(part.ids)), part.deep)
		if err != nil {
			return nil, fmt.Errorf("heal: %w", err)
		}
		maps.Copy(healed, done)
	}
	return healed, nil
}

// again examines an image once more. ok is false when it is not there any more.
func (c repairer) again(ctx context.Context, i Image) (now Image, ok bool, err error) {
	all, err := c.pass(ctx, map[place]bool{i.place(): true})
	if err != nil {
		return i, false, err
	}
	for _, n := range all {
		if n.Manifest == i.Manifest && n.Platform == i.Platform {
			return n, true, nil
		}
	}
	// A manifest that nothing leads to any more has no platform.
	if len(all) == 1 {
		return all[0], true, nil
	}
	return i, false, nil
}

// act takes the next step for one image. What keeps it from being repaired is in Blocked;
// the error is that of ctx, or of containerd, which does not answer.
func (c repairer) act(ctx context.Context, r *Repair, healed map[uint64]string, o RepairOptions) error {
	now, ok, err := c.again(ctx, r.Image)
	if err != nil {
		return err
	}
	done := texts(r.Image, healed)
	healedAgain := false
	for ok {
		if now.healable() && !healedAgain {
			// It has a good blob, perhaps only since the daemon has had it fetched, too. Healed in
			// place, containers may stand on it, and the images that share the layer keep their snapshots.
			healedAgain = true
			healed, err := c.heal(ctx, []Repair{{Image: now}}, o)
			if err != nil {
				return err
			}
			done = append(done, texts(now, healed)...)
			if now, ok, err = c.again(ctx, now); err != nil {
				return err
			}
			continue
		}
		step, blocked, err := c.next(namespaces.WithNamespace(ctx, now.Namespace), now, o, false)
		if err != nil {
			return err
		}
		r.Blocked = blocked
		if step == nil {
			break
		}
		text, err := c.take(namespaces.WithNamespace(ctx, now.Namespace), now, *step, o)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if text != "" {
			done = append(done, text)
		}
		if err != nil {
			r.Blocked = err.Error()
		}
		if now, ok, err = c.again(ctx, now); err != nil {
			return err
		}
		if step.Action != ActFetch {
			break
		}
		o.fetched = true
	}
	r.Done, r.Dropped = strings.Join(done, "; "), !ok
	if ok {
		plan := r.Plan
		*r = Repair{Image: now, Plan: plan, Blocked: r.Blocked, Done: r.Done}
		return nil
	}
	r.Blocked = ""
	if r.Done == "" {
		r.Done = "gone: its names were deleted with those of another image that has the same layers"
	}
	return nil
}

// take takes a step, and returns what was done, also beside an error.
func (c repairer) take(ctx context.Context, i Image, s Step, o RepairOptions) (done string, err error) {
	switch s.Action {
	case ActDropBlobs:
		gone, err := c.dropBlobs(ctx, i, s.blobs)
		if len(gone) > 0 {
			done = "dropped: " + flaws(gone)
		}
		return done, err
	case ActFetch:
		return c.fetchAndHeal(ctx, i, s, o)
	case ActUnpack:
		return c.unpackAgain(ctx, i, o)
	case ActDropLayer:
		return c.dropLayer(ctx, i, s.layers[0], o)
	case ActDropNames:
		return c.takeNames(ctx, i, s)
	}
	return "", nil
}

// fetchAndHeal brings back what is not usable, from archives or else by a fetch of containerd's,
// and heals the damaged layers that have a good blob then. That it cannot be had is no error: the
// next step is taken.
func (c repairer) fetchAndHeal(ctx context.Context, i Image, s Step, o RepairOptions) (string, error) {
	s.wanted.Layer.Snapshotter = c.o.Snapshotter
	put, err := c.putBack(ctx, i, s.blobs)
	if err != nil {
		return "", err
	}
	done := fmt.Sprintf("put back %s from image archives", count(put, "blob"))
	if put < len(s.blobs) && o.Registry {
		err := refill.FetchImage(ctx, c.view, s.wanted, o.Hosts)
		if failed := (*refill.FetchError)(nil); errors.As(err, &failed) && put == 0 {
			return err.Error(), nil
		} else if err != nil && failed == nil {
			return "", err
		} else if err != nil {
			done += "; " + err.Error()
		} else {
			done = fmt.Sprintf("fetched %s", count(len(s.blobs), "blob"))
		}
	} else if put == 0 {
		return "no image archive has what is not usable", nil
	}
	if len(i.facts.having(LayerDamaged)) == 0 {
		return done, nil
	}
	healed, err := c.heal(ctx, []Repair{{Image: i}}, o)
	return strings.Join(append([]string{done}, texts(i, healed)...), "; "), err
}

// texts is what was done with each damaged layer of an image.
func texts(i Image, healed map[uint64]string) (all []string) {
	for _, l := range i.facts.having(LayerDamaged) {
		if text := healed[l.ID]; text != "" {
			all = append(all, fmt.Sprintf("%s: %s", short(l.ChainID), text))
		}
	}
	return all
}

// healable reports whether all that is broken are damaged layers with a good blob.
func (i Image) healable() bool {
	damaged := i.facts.having(LayerDamaged)
	return len(damaged) > 0 && len(i.facts.having(LayerLost)) == 0 &&
		!slices.ContainsFunc(damaged, func(l Layer) bool { return l.Source == "" })
}

// putBack puts back those of the bad layer blobs of an image that archives have, and returns how
// many. The error is that of containerd; an archive that cannot be used is none.
func (c repairer) putBack(ctx context.Context, i Image, bad []repull.Blob) (put int, err error) {
	if c.o.Archives == nil {
		return 0, nil
	}
	for _, l := range i.facts.layers {
		if !slices.ContainsFunc(bad, func(b repull.Blob) bool { return b.Digest == l.Blob }) {
			continue
		}
		found, _ := c.o.Archives.Find(ctx, blobs.Layer{ChainID: l.ChainID})
		for _, b := range found {
			if b.Digest != "" && b.Digest != l.Blob {
				continue // the same tar, compressed otherwise: the manifest does not refer to it
			}
			did, err := refill.PutBack(ctx, c.view, layerOf(i, c.o.Snapshotter, l), refill.Bytes{Digest: b.Digest, Size: b.Size, Open: b.Raw})
			var unusable *refill.BytesError
			if err != nil && !errors.As(err, &unusable) {
				return put, err
			}
			if did {
				put++
				break
			}
		}
	}
	return put, ctx.Err()
}

// dropBlobs deletes bad blobs. They are read again before.
func (c repairer) dropBlobs(ctx context.Context, i Image, bad []repull.Blob) ([]repull.Blob, error) {
	return c.view.DropBlobs(ctx, repull.Layer{Namespace: i.Namespace, Snapshotter: c.o.Snapshotter}, bad)
}

// confirm verifies a layer once more before anything of it is removed.
func (c repairer) confirm(ctx context.Context, i Image, l Layer, o RepairOptions) error {
	if l.State == LayerLost {
		k, err := c.keyAt(ctx, l.ChainID)
		if err != nil {
			return err
		}
		if !k.lost {
			return fmt.Errorf("nothing is removed: the snapshotter has snapshot %s", short(l.ChainID))
		}
		return nil
	}
	return o.Confirm(ctx, i.space.rows[l.Name], l.deep)
}

// dropLayer makes containerd forget a layer that nothing on this node can repair. With Force
// the snapshots of containers without a process go first, after the evidence was gathered.
func (c repairer) dropLayer(ctx context.Context, i Image, l Layer, o RepairOptions) (string, error) {
	confirm := func(ctx context.Context) error { return c.confirm(ctx, i, l, o) }
	layer, options := layerOf(i, c.o.Snapshotter, l), c.dropOptions(o, confirm)
	if _, err := c.view.Plan(ctx, layer, options); err != nil {
		return "", err
	}
	if err := c.removeExited(ctx, i, func() error { return confirm(ctx) }); err != nil {
		return "", err
	}
	done, err := c.conn.Drop(ctx, layer, options)
	if done.Nothing() {
		return "", err
	}
	return done.String(), err
}

// removeExited removes the snapshots of the containers that hold an image, all of which have
// no process. One that has started meanwhile keeps all of them.
func (c repairer) removeExited(ctx context.Context, i Image, confirm func() error) error {
	if len(i.facts.holders) == 0 {
		return nil
	}
	if err := confirm(); err != nil {
		return err
	}
	holders := c.holders(ctx, i.space, i.facts.having(LayerDamaged, LayerLost))
	if !allExited(holders) {
		return errors.New(holdersOf(holders))
	}
	for _, h := range holders {
		if err := c.view.Snapshotter(c.o.Snapshotter).Remove(ctx, h.key); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("remove the snapshot of %s: %w", h.Text, err)
		}
	}
	return nil
}

// takeNames leaves nothing of an image but its good blobs and snapshots, on lease, so that
// the next pull fetches what was bad and only that. The names come last: as long as they are
// there, an interrupted repair is found again by them.
func (c repairer) takeNames(ctx context.Context, i Image, s Step) (string, error) {
	lease, err := c.lease(ctx, i)
	if err != nil {
		return "", err
	}
	gone, err := c.dropBlobs(ctx, i, s.blobs)
	if err == nil && len(gone) < len(s.blobs) {
		err = errors.New("a blob was good when it was read again: no name is deleted")
	}
	if err == nil {
		err = c.deleteNames(ctx, i.entry.records)
	}
	text := ""
	if len(gone) > 0 {
		text = "dropped: " + flaws(gone) + "; "
	}
	if err != nil {
		return strings.TrimSuffix(text, "; "), errors.Join(err, c.unlease(ctx, lease))
	}
	return text + "deleted the names; until a registry can be reached the image is not on this node", nil
}

func (c repairer) deleteNames(ctx context.Context, records []*imagesapi.Image) error {
	for _, r := range records {
		if err := c.view.DeleteImage(ctx, r); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	return nil
}

// announce makes the CRI plugin read the images again that are ready now: it reads snapshots
// only when containerd starts, or when the record of an image is changed.
func (c repairer) announce(ctx context.Context, repaired []Repair) error {
	var layers []repull.Layer
	for _, r := range repaired {
		if r.Dropped || r.Done == "" || len(r.Layers) == 0 || r.Verdict != Ready && r.Verdict != Incomplete {
			continue
		}
		layers = append(layers, repull.Layer{
			Namespace: r.Namespace, Snapshotter: c.o.Snapshotter, ChainID: digest.Digest(r.Layers[len(r.Layers)-1].ChainID),
		})
	}
	if len(layers) == 0 {
		return nil
	}
	_, err := c.conn.Announce(ctx, layers)
	return err
}
