package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	digest "github.com/opencontainers/go-digest"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
	"github.com/durable-snapshotter/durable-snapshotter/internal/faults"
	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/overlayutil"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// errRemoved ends the healing of a layer that was removed meanwhile.
var errRemoved = errors.New("the layer was removed")

// heal extracts a damaged layer again, out of its blob in containerd's content
// store, and puts the new tree in the place of the damaged one. Its parents are
// whole.
func (s *Snapshotter) heal(ctx context.Context, l *layer) {
	r := &s.ready
	r.mu.Lock()
	if l.state.State != storage.StateDamaged {
		r.mu.Unlock()
		return
	}
	l.state.State = storage.StateHealing
	entry := l.entry
	r.mu.Unlock()

	start := time.Now()
	healed, err := s.extractAgain(ctx, entry)
	if err != nil {
		s.notHealed(ctx, l, err)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	l.entry = healed
	l.state = storage.StateEntry{ID: entry.ID, State: storage.StateReady, Epoch: r.epoch, Checked: time.Now().UTC()}
	s.tellReady(l)
	log.G(ctx).WithFields(log.Fields{"name": entry.Name, "id": entry.ID, "took": time.Since(start).String()}).
		Warn("a damaged layer was extracted again from its blob")
}

// notHealed notes why a layer is damaged still.
func (s *Snapshotter) notHealed(ctx context.Context, l *layer, err error) {
	r := &s.ready
	r.mu.Lock()
	defer r.mu.Unlock()
	if l.state.Reason != err.Error() && !errors.Is(err, errRemoved) && ctx.Err() == nil {
		log.G(ctx).WithFields(log.Fields{"name": l.entry.Name, "id": l.entry.ID}).WithError(err).Error("A DAMAGED LAYER WAS NOT HEALED")
	}
	l.state.State, l.state.Reason, l.tried = storage.StateDamaged, err.Error(), time.Now()
	l.noBlob = errors.Is(err, errNoBlob)
	r.unsaid[l.entry.ID] = l.state
	if s.cfg.OnDamaged != nil && ctx.Err() == nil {
		s.cfg.OnDamaged(l.damaged())
	}
}

// errNoBlob means that all blobs that a layer could come from are missing or
// corrupt.
var errNoBlob = errors.New("there is no good blob of it")

// extractAgain tries the blobs that a layer can come from, and returns its new
// journal entry.
func (s *Snapshotter) extractAgain(ctx context.Context, entry storage.CommitEntry) (healed storage.CommitEntry, err error) {
	candidates, err := blobsOf(ctx, s.blobs, entry)
	if errors.Is(err, blobs.ErrNotFound) {
		return healed, fmt.Errorf("%w: %w", errNoBlob, err)
	}
	if err != nil {
		return healed, err
	}
	if err := s.writable(ctx); err != nil {
		return healed, err
	}
	errs, bad := []error(nil), 0
	for _, b := range candidates {
		healed, err := s.extractFrom(ctx, entry, b)
		if err == nil {
			return healed, nil
		}
		errs = append(errs, fmt.Errorf("extract %s: %w", b.Digest, err))
		if errors.Is(err, blobs.ErrNotFound) || errors.Is(err, blobs.ErrCorrupt) {
			bad++
		}
		if ctx.Err() != nil || errors.Is(err, errRemoved) || isWriteFailure(err) {
			break
		}
	}
	if bad == len(candidates) {
		return healed, fmt.Errorf("%w: %w", errNoBlob, errors.Join(errs...))
	}
	return healed, errors.Join(errs...)
}

// blobsOf finds the blobs that a layer can be extracted from.
func blobsOf(ctx context.Context, store *blobs.Store, e storage.CommitEntry) ([]blobs.Blob, error) {
	if e.ChainID == "" {
		return nil, errors.New("its chain ID is not known, so no blob can be found for it")
	}
	return store.Find(ctx, e.ChainID)
}

// extractFrom makes healing/<id> out of a blob and swaps it with
// snapshots/<id>.
func (s *Snapshotter) extractFrom(ctx context.Context, entry storage.CommitEntry, b blobs.Blob) (healed storage.CommitEntry, err error) {
	dir := filepath.Join(s.healingDir(), strconv.FormatUint(entry.ID, 10))
	// After an attempt that failed late this may be the damaged tree.
	if err := s.keepReplaced(dir); err != nil {
		return healed, err
	}
	exchanged := false
	if err := fsync.MkdirAll(filepath.Join(dir, "fs"), 0o700); err != nil {
		return healed, err
	}
	defer func() {
		if err != nil && !exchanged {
			_ = os.RemoveAll(dir) // or the next start does it
		}
	}()
	// Before the first byte: it hears of every write that fails from here on.
	cursor, err := fsync.OpenCursor(mutantHealed(dir))
	if err != nil {
		return healed, err
	}
	defer cursor.Close()
	failures := s.failures.Load()

	var info snapshots.Info
	if err := s.db.View(ctx, func(ctx context.Context, _ *storage.Journal) error {
		id, now, _, err := storage.Info(ctx, entry.Name)
		if errdefs.IsNotFound(err) || err == nil && id != entry.ID {
			return errRemoved
		}
		info = now
		return err
	}); err != nil {
		return healed, err
	}
	lower, err := s.lowerOf(ctx, info.Parent)
	if err != nil {
		return healed, err
	}
	if err := s.unpack(ctx, dir, b, lower); err != nil {
		return healed, err
	}
	faults.Point(faults.HealExtracted)
	healed, err = s.reseal(ctx, dir, entry, info, lower)
	if err != nil {
		return healed, err
	}
	// The heavy part of the sync happens outside the locks.
	if err := cursor.Sync(); err != nil {
		s.onWriteFailure(ctx, err, undo{})
		return healed, err
	}
	exchanged, err = s.swap(ctx, dir, cursor, failures, healed)
	return healed, err
}

// unpack extracts a layer's blob into dir/fs the way containerd's applier does
// (core/diff/apply/apply_linux.go) when it gets our mounts, and checks that it
// was the layer it was said to be.
func (s *Snapshotter) unpack(ctx context.Context, dir string, b blobs.Blob, lower []string) error {
	root := filepath.Join(dir, "fs")
	// The mode and owner that Prepare gives it (plugins/snapshots/overlay).
	if err := os.Chmod(root, 0o755); err != nil {
		return err
	}
	if len(lower) > 0 {
		if err := sameOwner(root, lower[0]); err != nil {
			return err
		}
	}
	tar, err := s.blobs.Layer(ctx, b)
	if err != nil {
		return err
	}
	defer tar.Close()
	digester := digest.Canonical.Digester()
	r := io.TeeReader(tar, digester.Hash())
	switch {
	case len(lower) == 0:
		_, err = archive.Apply(ctx, root, r)
	case inUserNS():
		work := filepath.Join(dir, "work")
		if err := os.Mkdir(work, 0o711); err != nil {
			return err
		}
		o := overlayutil.Options{Work: work, Upper: root, Lower: lower, Rest: s.options}
		err = mount.WithTempMount(ctx, []mount.Mount{{Type: "overlay", Source: "overlay", Options: o.Strings()}}, func(merged string) error {
			_, err := archive.Apply(ctx, merged, r)
			return err
		})
	default:
		opts := []archive.ApplyOpt{archive.WithConvertWhiteout(archive.OverlayConvertWhiteout)}
		if !s.features.LowerApart {
			opts = append(opts, archive.WithParents(lower)) // see adapt
		}
		_, err = archive.Apply(ctx, root, r, opts...)
	}
	if err != nil {
		return s.blobs.Blame(ctx, b, err)
	}
	if _, err := io.Copy(io.Discard, r); err != nil {
		return err
	}
	if got := digester.Digest(); got != b.DiffID {
		return fmt.Errorf("it holds %s, the image says %s: %w", got, b.DiffID, blobs.ErrCorrupt)
	}
	return nil
}

// reseal does for the new tree what Commit does: marks in order, seal, record.
func (s *Snapshotter) reseal(ctx context.Context, dir string, entry storage.CommitEntry, info snapshots.Info, lower []string) (storage.CommitEntry, error) {
	t := s.newTruth(lower, !inUserNS() || len(lower) == 0, len(lower) > 0)
	c, err := seal.Write(ctx, filepath.Join(dir, "fs"), filepath.Join(dir, sealFile), t.entry)
	if err != nil {
		return entry, err
	}
	entry.Entries, entry.Bytes, entry.Digest = c.Entries, c.Bytes, c.Digest
	entry.Strategy, entry.Epoch, entry.BootID, entry.RunID = storage.StrategyHealed, s.ready.epoch, s.bootID, s.runID
	return entry, replaceRecord(dir, committedRecord(entry.ID, info, c, t), false)
}
