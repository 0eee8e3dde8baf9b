package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/active"
	"github.com/durable-snapshotter/durable-snapshotter/internal/archives"
	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
	"github.com/durable-snapshotter/durable-snapshotter/internal/gate"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layers"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/replaced"
	"github.com/durable-snapshotter/durable-snapshotter/internal/scrub"
	"github.com/durable-snapshotter/durable-snapshotter/internal/tree"
	"github.com/durable-snapshotter/durable-snapshotter/overlayutil"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Config of a Snapshotter. The fields that containerd's overlayfs plugin has
// mean what they mean there.
type Config struct {
	Root           string   // absolute; made when missing
	MountOptions   []string // for overlay mounts, not for bind mounts
	UpperdirLabel  bool     // add containerd.io/snapshot/overlay.upperdir to Stat
	SyncRemove     bool     // delete in Remove, not in Cleanup
	SlowChown      bool     // accepted for parity; the client does the chown
	JournalHistory uint64   // removed snapshots whose journal entries are kept

	// ContentRoot is the directory of containerd's content store, out of whose
	// blobs damaged layers are healed; "" when there is none.
	ContentRoot string
	// Sync is how Apply makes a layer durable. "" is Syncfs.
	Sync fsync.Mode
	// Archives are image archives, and directories of them, out of which layers are healed
	// that have no good blob in the content store.
	Archives []string
	// BootID names the boot of the kernel; "" means the kernel's own. Tests
	// let machines boot with it.
	BootID string
	// NoBackground leaves layers alone until a caller needs them: nothing is verified,
	// digested or scrubbed by itself.
	NoBackground bool
	// Scrub controls the verification of all layers in the background.
	Scrub scrub.Config
	// OnDamaged is called when a damaged layer could not be healed; again and
	// again, while it cannot. It must not call back, nor take long.
	OnDamaged func(*layers.DamagedError)
	// OnReady is called when a layer is ready after a question about it was
	// answered with an error. The same holds for it.
	OnReady func(storage.CommitEntry)
	// OnCommit is called before Commit answers, with containerd's namespace, "" when
	// the name has none, and containerd's name of the snapshot. The same holds for it,
	// and more: containerd holds its locks, and may yet take back the Commit.
	OnCommit func(namespace, name string)
	// OnOutside is called with a layer that was healed out of a blob which is not in the
	// content store, and with that. The same holds for it.
	OnOutside func(storage.CommitEntry, blobs.Blob)
	// OnBrake is called with the reason when damaged layers are not mended any
	// more because too much is damaged at once, and with "" when they are again.
	// The same holds for it.
	OnBrake func(reason string)

	// OnHealth is called with an error when the file system stops accepting
	// writes and with nil when it accepts them again. It must not call back.
	OnHealth func(error)
}

// Sources is where the blobs of layers can come from, in order: the content store, then
// archives.
func (cfg Config) Sources() blobs.Source {
	store, outside := blobs.Open(cfg.ContentRoot), cfg.Outside()
	if outside == nil {
		return store
	}
	return blobs.InOrder(store, outside)
}

// Outside is Sources without the content store, nil when there is nothing else.
func (cfg Config) Outside() blobs.Source {
	if len(cfg.Archives) == 0 {
		return nil
	}
	return archives.Open(cfg.Archives)
}

// Snapshotter is a containerd snapshotter; see the package documentation.
type Snapshotter struct {
	cfg     Config
	root    layout.Root
	db      *storage.DB
	overlay snapshots.Snapshotter
	gate    *gate.Gate
	bootID  string
	runID   string

	options       []string // of overlay mounts
	selfContained []string // further ones of writable overlay mounts
	features      *overlayutil.Features

	keys     *layers.Keys
	creating sync.Mutex // see "lock order" in doc.go

	actives active.Set

	layers *layers.Layers
	blobs  blobs.Source

	emptyBad error    // why empty/ cannot be a lower directory
	warned   sync.Map // what warnOnce has logged
	trees    *replaced.Trees

	background context.Context
	stop       context.CancelFunc
	running    sync.WaitGroup
	stopping   sync.Once
	closeAt    time.Time // set by stopping
}

var (
	_ snapshots.Snapshotter = (*Snapshotter)(nil)
	_ snapshots.Cleaner     = (*Snapshotter)(nil)
)

// New opens or makes the root, recovers what a crash left, and returns a
// snapshotter that is ready to serve. Errors name what is wrong with the root:
// see fsync.Inspect, overlayutil.Check and storage.Open. Warnings go to the
// log of ctx, once.
func New(ctx context.Context, cfg Config) (_ *Snapshotter, err error) {
	if err := prepareRoot(ctx, cfg.Root); err != nil {
		return nil, err
	}
	if err := overlayutil.CheckOptions(cfg.MountOptions); err != nil {
		return nil, err
	}
	db, err := storage.Open(ctx, cfg.Root, storage.Options{
		History: cfg.JournalHistory, Passing: cfg.NoBackground,
		OnWait: func() {
			log.G(ctx).WithField("root", cfg.Root).Warn("a verb such as repair --apply has the root: the start goes on when it has ended")
		},
	})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, db.Close())
		}
	}()
	s := &Snapshotter{
		cfg: cfg, root: layout.Root{Path: cfg.Root}, db: db, keys: layers.NewKeys(),
		runID: layout.NewRunID(), features: &overlayutil.Features{}, blobs: cfg.Sources(),
	}
	if s.bootID = cfg.BootID; s.bootID == "" {
		if s.bootID, err = layout.BootID(); err != nil {
			return nil, err
		}
	}
	if err := fsync.MkdirAll(s.root.Snapshots(), 0o700); err != nil {
		return nil, err
	}
	s.gate = gate.New(db, gate.Config{Root: cfg.Root, Dir: s.root.Snapshots(), Sync: cfg.Sync, OnHealth: cfg.OnHealth})
	if err := s.findAreas(ctx, db.Path()); err != nil {
		return nil, err
	}
	s.trees = replaced.New(s.root, s.gate, s.bootID, s.warnOnce)
	if err := s.makeEmpty(ctx); err != nil {
		return nil, err
	}
	if s.options, s.selfContained, *s.features, err = overlayMountOptions(cfg.Root, cfg.MountOptions); err != nil {
		return nil, err
	}
	if s.overlay, err = overlay.NewSnapshotter(cfg.Root, s.overlayOptions(db)...); err != nil {
		return nil, err
	}

	s.background, s.stop = context.WithCancel(context.WithoutCancel(ctx))
	s.layers = layers.New(ctx, layers.Config{
		Root: s.root, Gate: s.gate, Keys: s.keys, Blobs: s.blobs, BootID: s.bootID, RunID: s.runID,
		MountOptions: s.options, Features: s.features, Replaced: s.trees, Scrub: cfg.Scrub,
		OnDamaged: cfg.OnDamaged, OnReady: cfg.OnReady, OnOutside: cfg.OnOutside, OnBrake: cfg.OnBrake, WarnOnce: s.warnOnce,
	})
	if err := s.recover(ctx); err != nil {
		s.Stopping()
		return nil, errors.Join(err, s.actives.Close())
	}
	_ = db.Release(ctx) // an error costs memory only, here as in Walk
	s.layers.Watch()
	if cfg.NoBackground {
		s.running.Go(func() { s.trees.Delete(s.background) })
	} else {
		s.running.Go(func() { s.trees.Run(s.background) })
		s.layers.Run()
	}
	return s, nil
}

// Root is the directory of the snapshotter.
func (s *Snapshotter) Root() string { return s.root.Path }

// Healthy returns nil when the file system of the root accepts writes, else Unavailable with the
// cause.
func (s *Snapshotter) Healthy(ctx context.Context) error { return s.gate.Open(ctx) }

// Layers is what is known of the committed layers: it verifies and heals them.
func (s *Snapshotter) Layers() *layers.Layers { return s.layers }

// prepareRoot makes the root and refuses one that cannot keep the promises.
func prepareRoot(ctx context.Context, root string) error {
	if !filepath.IsAbs(root) {
		return fmt.Errorf("root %q: not an absolute path: %w", root, errdefs.ErrInvalidArgument)
	}
	if strings.ContainsAny(root, ":,\\") {
		// They separate and quote the options of an overlay mount.
		return fmt.Errorf("root %q: contains one of : , \\, which overlay mount options cannot hold: %w", root, errdefs.ErrInvalidArgument)
	}
	if err := fsync.MkdirAll(root, 0o700); err != nil {
		return fmt.Errorf("root: %w", err)
	}
	warnings, err := fsync.Inspect(root)
	if err != nil {
		return fmt.Errorf("root: %w", err)
	}
	for _, w := range warnings {
		log.G(ctx).WithField("cure", w.Cure).Warn(w.Problem)
	}
	switch err := overlayutil.Check(root); {
	case fsync.IsFull(err):
		// What is there must be served all the same, and removed to make room.
		log.G(ctx).WithError(err).WithField("cure", "remove images").
			Warn("the disk is full: overlay mounts were not tried")
	case err != nil:
		return fmt.Errorf("root: %w", err)
	}
	return nil
}

// makeEmpty makes the lower directory of extractions without a parent. If
// another program put something into it, that would show in their mounts; where
// it cannot be moved away, such extractions are refused.
func (s *Snapshotter) makeEmpty(ctx context.Context) error {
	if entries, err := os.ReadDir(s.root.Empty()); err == nil && len(entries) > 0 {
		aside := filepath.Join(s.cfg.Root, layout.RemovingDir, "empty."+layout.NewRunID())
		log.G(ctx).Warnf("%s is not empty; its content is deleted", s.root.Empty())
		if err := os.Rename(s.root.Empty(), aside); err != nil {
			s.emptyBad = fmt.Errorf("%s has content and cannot be moved away; empty it and restart the daemon: %w", s.root.Empty(), err)
			log.G(ctx).WithError(s.emptyBad).Error("layers without a parent cannot be extracted in parallel")
			return nil
		}
	}
	// Without it an extraction of that kind cannot be mounted, which no
	// client does; and on a full disk there is none.
	return s.gate.UnlessFull(ctx, func() error { return fsync.MkdirAll(s.root.Empty(), 0o555) })
}

// findAreas decides where the directories lie into which trees are moved out of
// snapshots/: in the root, or in snapshots/ where that is a file system or a
// mount of its own, because rename(2) works within one mount only. There, the
// transaction after a sync no longer proves that the file system of the
// snapshots still takes writes, which is worth a warning.
func (s *Snapshotter) findAreas(ctx context.Context, database string) error {
	same, err := tree.SameMount(s.root.Snapshots(), s.cfg.Root)
	if err != nil {
		return err
	}
	if s.root.Apart = !same; s.root.Apart {
		log.G(ctx).WithField("cure", "keep the whole root on one file system").
			Warnf("%s is on another file system or mount than %s", s.root.Snapshots(), database)
	}
	for _, area := range s.root.Areas() {
		if err := s.gate.UnlessFull(ctx, func() error { return fsync.MkdirAll(filepath.Join(area, layout.RemovingDir), 0o700) }); err != nil {
			return err
		}
	}
	return nil
}

func (s *Snapshotter) overlayOptions(db *storage.DB) []overlay.Opt {
	// Deletion is always ours (remove.go): containerd's deletes by number after
	// its transaction, when the number may be in use again.
	opts := []overlay.Opt{overlay.WithMetaStore(db), overlay.AsynchronousRemove, overlay.WithMountOptions(s.options)}
	if s.cfg.UpperdirLabel {
		opts = append(opts, overlay.WithUpperdirLabel)
	}
	if s.cfg.SlowChown {
		opts = append(opts, overlay.WithSlowChown)
	}
	if s.features.IDMappedMounts {
		opts = append(opts, overlay.WithRemapIDs)
	}
	return opts
}

// Stat returns the row of an active key or a committed name. A committed one must be
// known to be whole (I2): Stat may take as long as the verification of the layers, or
// their healing, and then returns layers.DamagedError, or Unavailable when ctx has ended
// before.
func (s *Snapshotter) Stat(ctx context.Context, key string) (snapshots.Info, error) {
	if err := layout.CheckName("key", key); err != nil {
		return snapshots.Info{}, err
	}
	info, err := s.overlay.Stat(ctx, key)
	if err != nil || info.Kind != snapshots.KindCommitted {
		return info, err
	}
	if err := s.layers.Wait(ctx, key, true); err != nil {
		return snapshots.Info{}, fmt.Errorf("stat %q: %w", key, err)
	}
	return s.layers.Labels(info), nil
}

// Usage returns disk space and inodes: of a committed snapshot as Commit
// counted them, of an active one by counting now, without a trace in the times
// of access. What is gone uses nothing.
func (s *Snapshotter) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	if err := layout.CheckName("key", key); err != nil {
		return snapshots.Usage{}, err
	}
	var (
		id    uint64
		info  snapshots.Info
		usage snapshots.Usage
	)
	err := s.gate.View(ctx, func(ctx context.Context, _ *storage.Journal) (err error) {
		id, info, usage, err = storage.Info(ctx, key)
		return err
	})
	if err != nil || info.Kind != snapshots.KindActive {
		return usage, err
	}
	dir := s.root.Tree(id)
	if a := s.actives.Get(key); a != nil {
		// While a layer is applied, and until its Commit, it lies beside fs/.
		if made, beside, err := s.actives.Made(a); err != nil || made != nil && beside {
			dir = s.root.Applied(id)
		}
	}
	usage, err = diskUsage(ctx, dir)
	if isNotExist(err) {
		return snapshots.Usage{}, nil
	}
	return usage, err
}

// manyRows is how many rows take so much memory, at a page each, that a Walk gives it back.
const manyRows = 10_000

// Walk visits every row that matches one of the filters, as they were when it
// began. The rows are read first: a visitor that waits for a slow client would
// hold its read transaction, and with it, sooner or later, every writer.
func (s *Snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	var rows []snapshots.Info
	if err := s.overlay.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		rows = append(rows, info)
		return nil
	}, filters...); err != nil {
		return err
	}
	if len(rows) >= manyRows {
		_ = s.db.Release(ctx)
	}
	for _, info := range rows {
		if info.Kind == snapshots.KindCommitted {
			info = s.layers.Labels(info) // as Stat, but without a wait
		}
		if err := fn(ctx, info); err != nil {
			return err
		}
	}
	return nil
}

// Stopping ends the background work and the waiting for it: a call that waits
// until a layer was verified or healed returns Unavailable at once. Calls that
// need no such work go on. It returns immediately and may be called again; Close
// follows it.
func (s *Snapshotter) Stopping() {
	s.stopping.Do(func() {
		s.stop()
		s.layers.Stopping()
		s.closeAt = time.Now().Add(closeWait)
	})
}

// closeWait is how long Close waits for background work, from Stopping on. It
// ends at once unless the kernel holds it: a syncfs lasts as long as the disk is
// slow.
const closeWait = 2 * time.Second

// Close ends the background work, notes a clean stop, and releases the root.
// Nothing is deleted, and no row changes: a restart goes on where this process
// stopped.
//
// It waits for a transaction that has begun. A Commit that has not reached its
// transaction fails and has changed nothing that a start does not put right.
// Background work that the kernel holds for longer than closeWait is left
// behind; what it does after that fails, because the database is closed.
func (s *Snapshotter) Close() error {
	s.Stopping()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.background), max(time.Until(s.closeAt), 100*time.Millisecond))
	defer cancel()
	ended := make(chan struct{})
	go func() {
		func() { // a Prepare in flight may begin to follow its extraction
			s.creating.Lock()
			defer s.creating.Unlock()
		}()
		s.running.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-ctx.Done():
		log.G(s.background).Warn("background work did not end in time, and is left to the next start")
	}
	s.layers.Close(ctx)
	return errors.Join(s.actives.Close(), s.overlay.Close()) // closes the database too
}

// warnOnce logs a warning, once per key and start of the daemon.
func (s *Snapshotter) warnOnce(ctx context.Context, key string, fields log.Fields, message string) {
	if _, known := s.warned.LoadOrStore(key, true); !known {
		log.G(ctx).WithFields(fields).Warn(message)
	}
}
