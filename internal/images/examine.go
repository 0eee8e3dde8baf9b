package images

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
	"github.com/durable-snapshotter/durable-snapshotter/internal/library"
	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// statWithin bounds the only call of Stat, which may wait for a verification.
const statWithin = 5 * time.Second

// examine examines one image. The error is that of ctx.
func (c *Checker) examine(ctx context.Context, s *space, e entry) (Image, error) {
	i := Image{
		Namespace: s.name, Platform: e.platform, Target: e.target, Manifest: e.manifest.Digest,
		Layers: []Layer{}, space: s,
	}
	for _, r := range e.records {
		i.Names = append(i.Names, r.Name)
	}
	sortNames(i.Names)
	i.Name = i.Names[0]
	f := facts{documents: e.documents, unclear: e.unclear}
	descs, chain := e.layerBlobs(), e.manifest.Chain()
	if len(descs) > 0 && len(chain) != len(descs) && len(f.documents) == 0 {
		f.unclear = errors.Join(f.unclear, fmt.Errorf("the config names %d layers, the manifest %d", len(chain), len(descs)))
	}
	for n, d := range descs {
		flaw, err := c.flaw(ctx, s, d, c.o.Deep)
		if ctx.Err() != nil {
			return i, ctx.Err()
		}
		f.unclear = errors.Join(f.unclear, err)
		f.addBlob(repull.Blob{Digest: d.Digest, Size: c.size(s, d), Flaw: flaw})
		if len(chain) != len(descs) {
			continue
		}
		l, err := c.layer(ctx, s, chain[n], d, flaw)
		if err != nil {
			return i, err
		}
		// It may have been read meanwhile, for a layer that is not ready.
		f.addBlob(repull.Blob{Digest: d.Digest, Size: c.size(s, d), Flaw: l.Flaw})
		f.layers = append(f.layers, l)
	}
	if len(descs) == 0 {
		for _, name := range chain {
			l, err := c.layer(ctx, s, name, ocispec.Descriptor{}, "")
			if err != nil {
				return i, err
			}
			f.layers = append(f.layers, l)
		}
	}
	for _, l := range f.layers {
		if err := s.keys[l.ChainID].err; err != nil && l.State == LayerUnknown {
			f.unclear = errors.Join(f.unclear, err)
		}
	}
	if broken := f.having(LayerDamaged, LayerLost); len(broken) > 0 {
		f.holders = c.holders(ctx, s, broken)
	}
	f.work = s.working(f, func(key string) bool { return c.removed(ctx, key) })
	f.others = c.others(ctx, s, e)
	if ctx.Err() != nil {
		return i, ctx.Err()
	}
	i.Layers = append(i.Layers, f.layers...)
	i.Holders = f.holders
	i.Verdict, i.Reason = judge(f)
	i.Fetch = f.fetch(s.lib, i.Name, e.target)
	i.facts, i.entry = f, e
	return i, nil
}

// addBlob adds a blob that is not good, once: an image can have the same layer twice.
func (f *facts) addBlob(b repull.Blob) {
	if b.Flaw != "" && !slices.ContainsFunc(f.blobs, func(o repull.Blob) bool { return o.Digest == b.Digest }) {
		f.blobs = append(f.blobs, b)
	}
}

func (c *Checker) size(s *space, d ocispec.Descriptor) int64 {
	if info, ok := s.lib.Blobs[d.Digest]; ok {
		return info.Size
	}
	return d.Size
}

// flaw returns what is wrong with a blob, as containerd has it in a namespace. The error
// proves nothing about it. read: not only its size counts.
func (c *Checker) flaw(ctx context.Context, s *space, d ocispec.Descriptor, read bool) (string, error) {
	info, ok := s.lib.Blobs[d.Digest]
	if !ok {
		return library.Missing, nil
	}
	if was, ok := c.good[d.Digest]; ok && (was || !read) {
		return "", nil
	}
	if known, ok := c.flaws[d.Digest]; ok {
		return known.text, known.err
	}
	defer c.step()
	return c.examineBlob(ctx, info, read)
}

func (c *Checker) examineBlob(ctx context.Context, info content.Info, read bool) (string, error) {
	text, err := c.view.Library().Sized(ctx, info, c.root)
	if text == "" && err == nil && read {
		text, err = c.view.Library().Flaw(ctx, info, c.root)
	}
	if text == "" && err == nil {
		c.good[info.Digest] = read
	} else {
		delete(c.good, info.Digest)
		c.flaws[info.Digest] = flaw{text, err}
	}
	return text, err
}

// layer determines what is known of a layer. The error is that of ctx.
func (c *Checker) layer(ctx context.Context, s *space, chainID string, blob ocispec.Descriptor, flaw string) (Layer, error) {
	l := Layer{ChainID: chainID, Blob: blob.Digest, Flaw: flaw}
	k, rows := s.keys[chainID], s.committed[chainID]
	switch {
	case k.err == nil && !k.known:
		l.State = LayerAbsent
		if flaw == "" {
			l.Source = blob.Digest.String()
		}
		return l, nil
	case k.lost:
		l.State = LayerLost
		return l, c.source(ctx, s, &l, blob, verify.Result{})
	case len(rows) == 0:
		l.State, l.Finding = LayerUnknown, "containerd and the snapshotter differ at this time"
		return l, ctx.Err()
	}
	row, err := c.meant(ctx, chainID, rows)
	if err != nil {
		l.State, l.Finding = LayerUnknown, err.Error()
		return l, ctx.Err()
	}
	l.ID, l.Name = row.ID, row.Name
	r, err := c.verified(ctx, row)
	if err != nil {
		return l, err
	}
	switch r.State {
	case storage.StateReady, verify.NotComparable:
		l.State = LayerReady
		if k.err != nil { // its tree is good, and it is not known whether containerd has it
			l.State, l.Finding = LayerUnknown, k.err.Error()
		}
		return l, nil
	case storage.StateDamaged, storage.StateHealing:
		l.State, l.Finding, l.deep = LayerDamaged, firstFinding(r), r.Depth == storage.DepthContent
		return l, c.source(ctx, s, &l, blob, r)
	}
	l.State, l.Finding = LayerUnknown, r.Reason
	return l, nil
}

// meant returns which of several rows with one chain ID containerd has on record. The others
// are left over from extractions that containerd has lost.
func (c *Checker) meant(ctx context.Context, chainID string, rows []Row) (Row, error) {
	if len(rows) == 1 {
		return rows[0], nil
	}
	ctx, cancel := context.WithTimeout(ctx, statWithin)
	defer cancel()
	info, err := c.view.Snapshotter(c.o.Snapshotter).Stat(ctx, chainID)
	if err != nil {
		return Row{}, fmt.Errorf("one of %d snapshots: %w", len(rows), err)
	}
	for _, r := range rows {
		if r.Sealed != "" && r.Sealed == info.Labels[repull.SealedLabel] {
			return r, nil
		}
	}
	return Row{}, fmt.Errorf("none of %d snapshots is that of containerd", len(rows))
}

// verified verifies the layer of a row, once. The error is that of ctx.
func (c *Checker) verified(ctx context.Context, row Row) (verify.Result, error) {
	key := rowKey{row.ID, row.Name}
	if r, ok := c.ready[key]; ok {
		return r, nil
	}
	r, removed, err := c.o.Verify(ctx, row)
	if err != nil {
		return r, err
	}
	c.step()
	if removed {
		r.State, r.Reason = storage.StateUnverified, "it was removed meanwhile"
	}
	if r.State == storage.StateReady || r.State == verify.NotComparable {
		c.ready[key] = r
	}
	return r, nil
}

// source finds what a layer that is not ready can be extracted from: its blob, which is read
// for that, or, of a damaged one, the blob of another image, or an archive. The error is that of
// ctx.
func (c *Checker) source(ctx context.Context, s *space, l *Layer, blob ocispec.Descriptor, r verify.Result) error {
	if blob.Digest != "" {
		flaw, err := c.flaw(ctx, s, blob, true)
		if err == nil {
			l.Flaw = flaw
		}
		if err == nil && flaw == "" {
			l.Source = blob.Digest.String()
			return ctx.Err()
		}
	}
	if l.State != LayerDamaged {
		return ctx.Err()
	}
	want := blobs.Layer{ChainID: l.ChainID, Parent: r.Parent, Entries: r.Entries, Bytes: r.Bytes}
	for _, from := range []blobs.Source{c.o.Blobs, c.o.Archives} {
		if from == nil || l.Source != "" {
			continue
		}
		found, _ := from.Find(ctx, want) // an error means that it has none
		for _, b := range found {
			if b.Place != "" {
				l.Source = b.Place
				break
			}
			flaw := ""
			if _, ok := s.lib.Blobs[b.Digest]; ok {
				flaw, _ = c.flaw(ctx, s, ocispec.Descriptor{Digest: b.Digest}, true)
			}
			if b.Digest != blob.Digest && flaw == "" {
				l.Source = b.Digest.String()
				break
			}
		}
	}
	return ctx.Err()
}

func firstFinding(r verify.Result) string {
	if len(r.Findings) == 0 {
		return r.Reason
	}
	text := fmt.Sprintf("%q", r.Findings[0].String())
	if more := len(r.Findings) - 1; more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return text
}

// holders are what stands on layers that are not ready: containers, and other snapshots that
// are no layers. What cannot be determined of a container counts as in use.
func (c *Checker) holders(ctx context.Context, s *space, broken []Layer) (found []Holder) {
	onBroken := func(name string) bool {
		for seen := 0; name != "" && seen < len(s.rows); seen++ {
			if r := s.rows[name]; r.Committed && slices.ContainsFunc(broken, func(l Layer) bool { return l.ChainID == keyOf(r) }) {
				return true
			}
			name = s.rows[name].Parent
		}
		return false
	}
	named := map[string]bool{}
	for _, container := range s.containers {
		for _, r := range s.rows {
			if keyOf(r) != container.Key || !onBroken(r.Name) {
				continue
			}
			if c.removed(ctx, container.Key) {
				continue
			}
			exited, err := c.view.Exited(ctx, container.ID)
			found = append(found, Holder{container.String(), exited && err == nil, container.Key})
			named[container.Key] = true
		}
	}
	for _, name := range slices.Sorted(maps.Keys(s.rows)) {
		r := s.rows[name]
		if _, extraction := isExtraction(r); r.Committed || extraction || named[keyOf(r)] || !onBroken(name) {
			continue
		}
		if c.removed(ctx, keyOf(r)) {
			continue
		}
		found = append(found, Holder{"snapshot " + keyOf(r), false, keyOf(r)})
	}
	return found
}

// removed reports whether containerd does not have a key any more: the snapshotter keeps the
// row until containerd's next collection.
func (c *Checker) removed(ctx context.Context, key string) bool {
	_, err := c.view.Snapshotter(c.o.Snapshotter).Usage(ctx, key)
	return errdefs.IsNotFound(err)
}

// working describes what a pull of the image is doing at this time, "" for nothing.
func (s *space) working(f facts, removed func(key string) bool) string {
	for _, d := range s.downloads {
		for _, b := range slices.Concat(f.documents, f.blobs) {
			if age := time.Since(d.UpdatedAt); strings.Contains(d.Ref, b.Digest.String()) && age < fetchWithin {
				return fmt.Sprintf("blob %s is being fetched", short(b.Digest.String()))
			}
		}
	}
	for _, r := range s.rows {
		chainID, ok := isExtraction(r)
		if !ok || r.Abandoned || time.Since(r.Created) > unpackWithin {
			continue
		}
		if slices.ContainsFunc(f.layers, func(l Layer) bool { return l.ChainID == chainID }) && !removed(keyOf(r)) {
			return fmt.Sprintf("layer %s is being unpacked", short(chainID))
		}
	}
	return ""
}

// others are the other snapshotters in which containerd has unpacked the whole image.
func (c *Checker) others(ctx context.Context, s *space, e entry) (names []string) {
	chain := e.manifest.Chain()
	if len(chain) == 0 || s.keys[chain[len(chain)-1]].known {
		return nil
	}
	for name, top := range s.lib.Unpackers(e.manifest.Config) {
		if name == c.o.Snapshotter || top != chain[len(chain)-1] {
			continue
		}
		if _, err := c.view.Snapshotter(name).Stat(ctx, top); err == nil {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}
