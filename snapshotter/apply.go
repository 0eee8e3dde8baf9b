package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/userns"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/active"
	applier "github.com/durable-snapshotter/durable-snapshotter/internal/extract"
	"github.com/durable-snapshotter/durable-snapshotter/internal/faults"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/marks"
	"github.com/durable-snapshotter/durable-snapshotter/internal/metrics"
	"github.com/durable-snapshotter/durable-snapshotter/internal/unpack"
	"github.com/durable-snapshotter/durable-snapshotter/overlayutil"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// ErrNotOurs is returned by Apply when nothing was done, because the mounts are not
// those of an extraction of this snapshotter, or must be mounted to be written to. Any
// applier may write to them, and Commit syncs what it has written.
var ErrNotOurs = errors.New("not an extraction of this snapshotter")

// Extract writes a layer into the directory root, which is empty, as extract.Apply does, and
// returns what is known of it then. files, which may be nil, get all regular files.
type Extract func(ctx context.Context, root string, whiteouts applier.Whiteouts, files *fsync.Files) (*unpack.Extracted, error)

// Apply extracts a layer into the snapshot that the mounts belong to, seals it, and
// makes it durable, outside of all locks. The Commit that follows only has to put the
// tree into its place, so it does not sync the file system.
//
// Until then the tree lies beside the directory that the mounts write to: that this
// directory is empty proves that nothing was written since. After any error but
// [ErrNotOurs] the snapshot can never be committed. A Remove of the snapshot ends Apply.
func (s *Snapshotter) Apply(ctx context.Context, mounts []mount.Mount, write Extract) (err error) {
	key, a, err := s.target(ctx, mounts)
	if err != nil {
		return err
	}
	if err := errors.Join(s.gate.Open(ctx), a.Writer.Poisoned()); err != nil {
		return err
	}
	ctx, end, err := s.actives.Begin(ctx, a)
	if err != nil {
		return fmt.Errorf("apply to %q: %w", key, err)
	}
	a.Leave() // what is extracted here is written here
	var made *active.Layer
	began := time.Now()
	err = errors.New("it panicked") // until it has returned
	defer func() {
		if err != nil {
			// Not wrapped: the kind of this error is not that of the refusal.
			a.Writer.Poison(fmt.Errorf("its extraction has failed (%v)", err))
			err = fmt.Errorf("apply to %q: %w", key, err)
		}
		end(made)
		metrics.Since(metrics.ApplySeconds, began)
	}()
	whiteouts := applier.Remove
	if mounts[0].Type == "overlay" {
		whiteouts = applier.Mark
	}
	made, err = s.apply(ctx, key, a, whiteouts, write)
	return err
}

// aheadFrom is the size of the tar of a layer whose sync is begun before it is sealed. What is
// smaller is sealed in less time than a flush of the disk's cache takes.
const aheadFrom = 128 << 10

func (s *Snapshotter) apply(ctx context.Context, key string, a *active.Snapshot, whiteouts applier.Whiteouts, write Extract) (*active.Layer, error) {
	var info snapshots.Info
	if err := s.gate.View(ctx, func(ctx context.Context, _ *storage.Journal) (err error) {
		_, info, _, err = storage.Info(ctx, key)
		return err
	}); err != nil {
		return nil, err
	}
	place := s.root.Applied(a.ID)
	if err := makePlace(place, s.root.Tree(a.ID)); err != nil {
		return nil, err
	}
	began := time.Now()
	phase := func(name string) {
		metrics.Since(metrics.ApplyPhaseSeconds.WithLabelValues(name), began)
		began = time.Now()
	}
	files := s.gate.Files()
	synced := false
	defer func() {
		if !synced {
			files.Close()
		}
	}()
	x, err := write(ctx, place, whiteouts, files)
	if err != nil {
		return nil, err
	}
	made := &active.Layer{Dirs: x.Dirs}
	phase(metrics.PhaseExtract)
	faults.Point(faults.ApplyExtracted)
	if x.Size >= aheadFrom {
		s.gate.SyncAhead(ctx, a.Writer, files) // beside the seal
	}

	needed := false
	if isRebase(info) {
		if needed, err = marks.ParentNeeded(ctx, place, made.Dirs); err != nil {
			return nil, err
		}
	}
	if !needed {
		t := treeOf(a, info, info.Parent)
		t.Path, t.Dirs = place, made.Dirs
		n, err := s.layers.Normalizer(ctx, t)
		if err != nil {
			return nil, err
		}
		if made.Sum, made.Contents, err = x.Seal(ctx, place, s.root.Dir(a.ID), n.Normalize, files); err != nil {
			return nil, err
		}
		made.Sealed, made.Found = true, n.Found()
	}
	phase(metrics.PhaseSeal)
	faults.Point(faults.ApplySealed)
	synced = true
	if err := s.gate.SyncApart(ctx, a.Writer, files); err != nil {
		return nil, err
	}
	phase(metrics.PhaseSync)
	faults.Point(faults.ApplySynced)
	return made, nil
}

// makePlace makes an empty directory in the image of another.
func makePlace(place, as string) error {
	if err := os.Mkdir(place, 0o755); err != nil {
		return err
	}
	// The mode that Prepare gives a layer's root (plugins/snapshots/overlay), whatever
	// the umask is, and the owner that it gave this one.
	if err := os.Chmod(place, 0o755); err != nil {
		return err
	}
	return marks.SameOwner(place, as)
}

// target finds the snapshot that the mounts belong to. The error is ErrNotOurs when Apply
// leaves it to others.
func (s *Snapshotter) target(ctx context.Context, mounts []mount.Mount) (key string, a *active.Snapshot, err error) {
	if len(mounts) != 1 || userns.RunningInUserNS() {
		return "", nil, ErrNotOurs
	}
	m := mounts[0]
	dir := m.Source
	if m.Type == "overlay" {
		dir = overlayutil.ParseOptions(m.Options).Upper
	}
	id, ok := layout.DirectoryID(filepath.Base(filepath.Dir(dir)))
	if !ok || dir != s.root.Tree(id) {
		return "", nil, ErrNotOurs
	}
	if key, a = s.actives.Numbered(id); a == nil || !a.Extraction {
		return "", nil, ErrNotOurs
	}
	if made, _, err := s.actives.Made(a); err != nil {
		return "", nil, fmt.Errorf("apply to %q: %w", key, err)
	} else if made != nil {
		return "", nil, fmt.Errorf("apply to %q: a layer was applied already: %w", key, errdefs.ErrFailedPrecondition)
	}
	// Owners are mapped by mounting.
	if len(mappings(m.Options)) > 0 {
		return "", nil, ErrNotOurs
	}
	ours, _, _, err := s.mountsOf(ctx, key)
	if err != nil {
		return "", nil, err
	}
	if len(ours) != 1 || ours[0].Type != m.Type || ours[0].Source != m.Source || !slices.Equal(ours[0].Options, m.Options) {
		return "", nil, ErrNotOurs
	}
	// What others have written stays, and is theirs to continue.
	empty, err := isEmpty(dir)
	if err == nil && !empty {
		err = ErrNotOurs
	}
	return key, a, err
}

func isEmpty(dir string) (bool, error) {
	names, err := namesIn(dir)
	return len(names) == 0, err
}

// place makes what Apply has made the tree of the snapshot. That it succeeds proves that nothing else was written.
// Neither name is synced.
func (s *Snapshotter) place(a *active.Snapshot) error {
	err := layout.Place(s.root, a.ID)
	if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) {
		err = fmt.Errorf("%s is not empty: it was written to after its layer had been applied: %w", s.root.Tree(a.ID), errdefs.ErrFailedPrecondition)
		a.Writer.Poison(err)
		return err
	}
	if err != nil {
		return err
	}
	s.actives.Placed(a)
	return nil
}
