package snapshotter

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// digestEvery is how often layers without content digests are looked for.
const digestEvery = 15 * time.Second

// digestAll adds content digests to the seals of new layers, so that their
// content can be compared later although their blobs are gone, until ctx ends.
func (s *Snapshotter) digestAll(ctx context.Context) {
	for rest(ctx, digestEvery) {
		for _, e := range s.undigested() {
			err := s.digest(ctx, e)
			if ctx.Err() != nil {
				return
			}
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				log.G(ctx).WithError(err).WithField("name", e.Name).Warn("no content digests for a layer")
				break // a full disk, or a bad one: later
			}
		}
		s.saySoon(ctx)
	}
}

// undigested returns the layers that get digests, oldest first. It must be
// sure that a digest is that of what was committed: the layer is of this boot,
// and nothing but this machine's memory lies between its Commit and the reading.
func (s *Snapshotter) undigested() (entries []storage.CommitEntry) {
	r := &s.ready
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range r.layers {
		if l.state.State == storage.StateReady && l.state.Contents == "" && l.entry.BootID == s.bootID && l.entry.Digest != "" {
			entries = append(entries, l.entry)
		}
	}
	slices.SortFunc(entries, func(a, b storage.CommitEntry) int { return int(a.ID) - int(b.ID) })
	return entries
}

// digest writes the content digests of one layer.
func (s *Snapshotter) digest(ctx context.Context, e storage.CommitEntry) error {
	if err := s.writable(ctx); err != nil {
		return err
	}
	dir := s.dir(e.ID)
	path := filepath.Join(dir, contentsFile)
	digest, err := seal.WriteContents(ctx, filepath.Join(dir, "fs"), path+".new", seal.Reading{Idle: true, Rate: s.cfg.Scrub.Rate})
	if err != nil {
		_ = os.Remove(path + ".new") // cut short; harmless, and not to be left
		return err
	}
	if err = fsync.File(path + ".new"); err == nil {
		err = fsync.Rename(path+".new", path)
	}
	if err != nil {
		if isWriteFailure(err) {
			s.onWriteFailure(ctx, err, undo{})
		}
		return err
	}
	r := &s.ready
	r.mu.Lock()
	defer r.mu.Unlock()
	// Not of a layer that was removed or replaced meanwhile.
	if l := r.layers[e.Name]; l != nil && l.entry.Sequence == e.Sequence && l.entry.Digest == e.Digest && l.work == nil && l.state.State == storage.StateReady {
		l.state.Contents = digest
		l.state.Epoch = r.epoch
		r.unsaid[e.ID] = l.state
	}
	return nil
}
