package layers

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
	"github.com/durable-snapshotter/durable-snapshotter/internal/faults"
	"github.com/durable-snapshotter/durable-snapshotter/internal/gate"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/recorded"
	"github.com/durable-snapshotter/durable-snapshotter/internal/unpack"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// healer extracts damaged layers again, and puts the new trees in their places.
type healer struct {
	table         *table
	recorder      *recorder
	gate          *gate.Gate
	root          layout.Root
	keys          *Keys
	blobs         blobs.Source
	unpack        *unpack.Unpacker
	replaced      Replaced
	bootID, runID string
}

// Replaced takes the trees that a heal leaves beside snapshots/.
type Replaced interface {
	// Keep puts a tree aside that was exchanged, and that mounts may use. It writes
	// through the gate.
	Keep(ctx context.Context, dir string) error
	// Discard deletes a tree that was never in use.
	Discard(ctx context.Context, dir string)
}

// errRemoved ends the healing of a layer that was removed meanwhile.
var errRemoved = errors.New("the layer was removed")

// errNoBlob means that all blobs that a layer could come from are missing or
// corrupt.
var errNoBlob = errors.New("there is no good blob of it")

// extractAgain tries the blobs that a layer can come from, and returns its new
// journal entry and the blob that it was extracted from.
func (h *healer) extractAgain(ctx context.Context, entry storage.CommitEntry) (healed storage.CommitEntry, used blobs.Blob, err error) {
	// When it was added, what is below it may not have been known yet.
	h.table.mu.Lock()
	entry.ChainID = recorded.ChainID(entry, h.table.find)
	h.table.mu.Unlock()
	err = h.blobs.Try(ctx, verify.BlobLayer(entry), func(b blobs.Blob) error {
		err := h.gate.Open(ctx)
		if err == nil {
			err = h.unpack.Room(entry.Bytes, entry.Entries)
		}
		if err == nil {
			used = b
			healed, err = h.extractFrom(ctx, entry, b)
		}
		if err != nil {
			return fmt.Errorf("extract %v: %w", b, err)
		}
		return nil
	})
	if blobs.Bad(err) {
		err = fmt.Errorf("%w: %w", errNoBlob, err)
	}
	return healed, used, err
}

// extractFrom makes healing/<id>.<boot> out of a blob and swaps it with
// snapshots/<id>.
func (h *healer) extractFrom(ctx context.Context, entry storage.CommitEntry, b blobs.Blob) (healed storage.CommitEntry, err error) {
	dir := h.root.HealingPlace(entry.ID, h.bootID)
	// After an attempt that failed late this may be the damaged tree.
	if err := h.replaced.Keep(ctx, dir); err != nil {
		return healed, err
	}
	if err := h.gate.Do(ctx, func() error { return fsync.MkdirAll(filepath.Join(dir, "fs"), 0o700) }); err != nil {
		return healed, err
	}
	exchanged := false
	defer func() {
		if err != nil && !exchanged {
			h.replaced.Discard(ctx, dir) // or the next start does it
		}
	}()
	// Before the first byte: its cursor reports every write that fails from here on.
	writer, err := h.gate.OpenWriter(dir, 0)
	if err != nil {
		return healed, err
	}
	defer writer.Close()

	var info snapshots.Info
	if err := h.gate.View(ctx, func(ctx context.Context, _ *storage.Journal) error {
		id, now, _, err := storage.Info(ctx, entry.Name)
		if errdefs.IsNotFound(err) || err == nil && id != entry.ID {
			return errRemoved
		}
		info = now
		return err
	}); err != nil {
		return healed, err
	}
	lower, err := h.unpack.Lower(ctx, info.Parent)
	if err != nil {
		return healed, err
	}
	extracted, err := h.unpack.Unpack(ctx, dir, b, lower)
	if err != nil {
		return healed, err
	}
	faults.Point(faults.HealExtracted)
	entry.Strategy, entry.Epoch, entry.BootID, entry.RunID = storage.StrategyHealed, h.table.epoch, h.bootID, h.runID
	healed, err = h.unpack.Reseal(ctx, dir, entry, info, lower, extracted)
	if err != nil {
		return healed, err
	}
	// The heavy part of the sync happens outside the locks.
	if err := h.gate.SyncApart(ctx, writer, nil); err != nil {
		return healed, err
	}
	exchanged, err = h.swap(ctx, dir, writer, healed)
	return healed, err
}
