package layers

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/contents"
	"github.com/durable-snapshotter/durable-snapshotter/internal/gate"
	"github.com/durable-snapshotter/durable-snapshotter/internal/idle"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// digestEvery is the pause between searches for layers without content digests. After a
// failure a layer waits longer each time, up to digestRarely: most of its content
// is read again.
const (
	digestEvery  = 15 * time.Second
	digestRarely = time.Hour
)

// digester takes content digests of new layers.
type digester struct {
	table    *table
	recorder *recorder
	gate     *gate.Gate
	root     layout.Root
	keys     *Keys
	bootID   string
	rate     int64 // bytes per second at most; 0: no limit
}

// digestAll adds content digests to the seals of new layers, so that their
// content can be compared later although their blobs are gone, until ctx ends.
func (d *digester) digestAll(ctx context.Context) {
	for idle.Rest(ctx, digestEvery) {
		for _, l := range d.undigested() {
			_, e := d.table.current(l)
			err := idle.Contain(func() error { return d.digest(ctx, l, e) })
			if ctx.Err() != nil {
				return
			}
			if err == nil {
				continue
			}
			d.table.mu.Lock()
			l.digests.Failed(digestEvery, digestRarely)
			d.table.mu.Unlock()
			if !errors.Is(err, fs.ErrNotExist) {
				log.G(ctx).WithError(err).WithField("name", e.Name).Warn("no content digests for a layer")
			}
			if gate.IsWriteFailure(err) || fsync.IsFull(err) {
				break // the others would fail as well
			}
		}
		_ = d.recorder.flush(ctx) // kept for the next time
	}
}

// undigested returns the layers that get digests, oldest first. It must be
// sure that a digest is that of what was committed: the layer was committed or
// healed in this boot by this database, and nothing but this machine's memory
// lies between that and the reading. A layer that was restored by a rebuild was
// not, although its entry is of this boot.
func (d *digester) undigested() (layers []*layer) {
	t := d.table
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, l := range t.layers {
		if l.state.State == storage.StateReady && l.state.Contents == "" && l.entry.Digest != "" && l.digests.Due() && d.digestible(l.entry) {
			layers = append(layers, l)
		}
	}
	slices.SortFunc(layers, func(a, b *layer) int { return cmp.Compare(a.entry.ID, b.entry.ID) })
	return layers
}

// digestible reports whether what is on disk of a layer is what this database
// has seen committed or healed.
func (d *digester) digestible(e storage.CommitEntry) bool {
	switch e.Strategy {
	case storage.StrategySyncfs, storage.StrategySyncfsCursorLost, storage.StrategyApplied, storage.StrategyHealed:
		return e.BootID == d.bootID
	}
	return false
}

// digest writes the content digests of one layer, and their digest into its
// record. Digests that are there and that the record names are kept.
func (d *digester) digest(ctx context.Context, l *layer, e storage.CommitEntry) error {
	if err := d.gate.Open(ctx); err != nil {
		return err
	}
	dir := d.root.Dir(e.ID)
	path := filepath.Join(dir, layout.ContentsFile)
	digest, kept := keptContents(dir, e.Digest)
	if !kept {
		if err := d.gate.Do(ctx, func() (err error) {
			digest, err = contents.Write(ctx, filepath.Join(dir, "fs"), path+".new", contents.Reading{Idle: true, Rate: d.rate})
			if err == nil {
				err = fsync.File(path + ".new")
			}
			return err
		}); err != nil {
			_ = os.Remove(path + ".new") // cut short; harmless, and not to be left
			return err
		}
	}
	// As the exchange of trees and Update do: they change the record, too.
	unlock, err := d.keys.Lock(ctx, e.Name)
	if err != nil {
		return err
	}
	defer unlock()
	t := d.table
	current := func() bool {
		return t.layers[e.Name] == l && l.entry.Ref().Same(e.Ref()) && l.work == nil && l.state.State == storage.StateReady
	}
	t.mu.Lock()
	ok := current()
	t.mu.Unlock()
	if !ok {
		_ = os.Remove(path + ".new") // removed or replaced meanwhile, with all that is in it
		return nil
	}
	if err := d.gate.Do(ctx, func() error {
		if !kept {
			if err := fsync.Rename(path+".new", path); err != nil {
				return err
			}
		}
		return recordContents(dir, digest)
	}); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if current() {
		t.put(l, func(s *storage.StateEntry) { s.Contents, s.Epoch, s.Tree = digest, t.epoch, e.Digest })
	}
	return nil
}

// keptContents returns the digest of the content digests that lie beside the
// layer, if they are those that the record of this tree names.
func keptContents(dir, tree string) (digest string, ok bool) {
	r, err := layout.ReadRecord(dir)
	if err != nil || r.Contents == "" || r.Digest != tree {
		return "", false
	}
	is, err := mtree.TextDigest(filepath.Join(dir, layout.ContentsFile))
	return is, err == nil && is == r.Contents
}

// recordContents puts the digest of the content digests into a layer's record, so
// that a rebuild of metadata.db finds it.
func recordContents(dir, digest string) error {
	r, err := layout.ReadRecord(dir)
	if err != nil || r.Contents == digest {
		return nil // without a record nothing can be rebuilt anyway
	}
	r.Contents = digest
	return layout.ReplaceRecordSync(dir, r)
}
