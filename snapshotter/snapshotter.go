package snapshotter

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/moby/locker"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
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
	// BootID names the boot of the kernel; "" means the kernel's own. Tests
	// let machines boot with it.
	BootID string
	// NoBackground leaves layers alone until somebody asks: nothing is verified,
	// digested or scrubbed by itself.
	NoBackground bool
	// Scrub says how often layers are verified while nobody asks.
	Scrub ScrubConfig
	// OnDamaged is called when a damaged layer could not be healed; again and
	// again, while it cannot. It must not call back, nor take long.
	OnDamaged func(*DamagedError)
	// OnReady is called when a layer is ready after a question about it was
	// answered with an error. The same holds for it.
	OnReady func(storage.CommitEntry)

	// OnHealth is called with an error when the file system stops accepting
	// writes and with nil when it accepts them again. It must not call back.
	OnHealth func(error)
}

// Snapshotter is a containerd snapshotter; see the package documentation.
type Snapshotter struct {
	cfg     Config
	overlay snapshots.Snapshotter
	db      *storage.DB
	bootID  string
	runID   string

	options       []string // of overlay mounts
	selfContained []string // further ones of writable overlay mounts
	space         overlayutil.Space
	features      overlayutil.Features

	keys     *locker.Locker
	creating sync.Mutex // see "lock order" in doc.go
	syncing  sync.Mutex

	mu      sync.Mutex         // guards actives
	actives map[string]*active // by key

	ready readiness
	blobs *blobs.Store
	run   storage.Run // guarded by mu, and said whether the journal has it
	said  bool

	trouble    trouble
	failures   atomic.Int64 // writes that have failed
	deleting   sync.Mutex   // one deletion of trees at a time
	background context.Context
	stop       context.CancelFunc
	running    sync.WaitGroup
	closing    sync.Once
}

var (
	_ snapshots.Snapshotter = (*Snapshotter)(nil)
	_ snapshots.Cleaner     = (*Snapshotter)(nil)
)

// active is what this process knows of an active snapshot.
type active struct {
	id         uint64
	extraction bool
	cursor     *fsync.Cursor
	shapedBy   string // of an extraction: the parent of its first Commit; guarded by the key's lock
	lost       bool   // the cursor was opened after a restart, not at Prepare
	refused    error  // why it can never be committed; guarded by Snapshotter.mu
}

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
	db, err := storage.Open(ctx, cfg.Root, storage.Options{History: cfg.JournalHistory})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, db.Close())
		}
	}()
	s := &Snapshotter{
		cfg: cfg, db: db, keys: locker.New(), actives: map[string]*active{},
		runID: newRunID(), ready: newReadiness(), blobs: blobs.Open(cfg.ContentRoot),
	}
	if s.bootID = cfg.BootID; s.bootID == "" {
		if s.bootID, err = bootID(); err != nil {
			return nil, err
		}
	}
	for _, dir := range []string{s.snapshotsDir(), s.removingDir()} {
		if err := fsync.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	if err := s.makeEmpty(ctx); err != nil {
		return nil, err
	}
	s.warnSplit(ctx)
	if s.options, s.selfContained, s.features, err = overlayMountOptions(cfg.Root, cfg.MountOptions); err != nil {
		return nil, err
	}
	s.space = overlayutil.SpaceOf(s.options)
	if s.overlay, err = overlay.NewSnapshotter(cfg.Root, s.overlayOptions()...); err != nil {
		return nil, err
	}

	s.background, s.stop = context.WithCancel(context.WithoutCancel(ctx))
	if err := s.recover(ctx); err != nil {
		s.stop()
		return nil, errors.Join(err, s.closeCursors())
	}
	s.running.Go(func() { s.watch(s.background) })
	s.running.Go(func() { s.deleteRemoving(s.background) })
	if !cfg.NoBackground {
		s.running.Go(func() { s.attendAll(s.background) })
		s.running.Go(func() { s.digestAll(s.background) })
		if cfg.Scrub.Interval > 0 {
			s.running.Go(func() { s.scrubAll(s.background) })
		}
	}
	return s, nil
}

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
	case errors.Is(err, unix.ENOSPC):
		// What is there must be served all the same, and removed to make room.
		log.G(ctx).WithError(err).WithField("cure", "remove images").
			Warn("the disk is full: overlay mounts were not tried")
	case err != nil:
		return fmt.Errorf("root: %w", err)
	}
	return nil
}

// makeEmpty makes the lower directory of extractions without a parent. If
// somebody put something into it, that would show in their mounts.
func (s *Snapshotter) makeEmpty(ctx context.Context) error {
	if entries, err := os.ReadDir(s.emptyDir()); err == nil && len(entries) > 0 {
		aside := filepath.Join(s.removingDir(), "empty-"+s.runID)
		log.G(ctx).Warnf("%s is not empty; its content is deleted", s.emptyDir())
		if err := os.Rename(s.emptyDir(), aside); err != nil {
			return err
		}
	}
	// Without it an extraction of that kind cannot be mounted, which nobody
	// does; and on a full disk there is none.
	return s.unlessFull(ctx, fsync.MkdirAll(s.emptyDir(), 0o555))
}

// warnSplit speaks of snapshots on another file system than the database: the
// transaction after a sync then no longer proves that the snapshots' file
// system still takes writes.
func (s *Snapshotter) warnSplit(ctx context.Context) {
	same, err := fsync.SameFilesystem(s.snapshotsDir(), s.db.Path())
	if err == nil && same {
		return
	}
	log.G(ctx).WithError(err).WithField("cure", "keep the whole root on one file system").
		Warnf("%s is on another file system than %s", s.snapshotsDir(), s.db.Path())
}

func (s *Snapshotter) overlayOptions() []overlay.Opt {
	// Deletion is always ours (remove.go): containerd's deletes by number after
	// its transaction, when the number may be in use again.
	opts := []overlay.Opt{overlay.WithMetaStore(s.db), overlay.AsynchronousRemove, overlay.WithMountOptions(s.options)}
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

// Stat returns the row of an active key or a committed name. Of a committed one
// it says nothing before it is known to be whole (I2): it may take as long as a
// look at the layers, or their healing, takes, and is then refused with
// [DamagedError], or with Unavailable when ctx has ended before.
func (s *Snapshotter) Stat(ctx context.Context, key string) (snapshots.Info, error) {
	if err := checkName("key", key); err != nil {
		return snapshots.Info{}, err
	}
	info, err := s.overlay.Stat(ctx, key)
	if err != nil || info.Kind != snapshots.KindCommitted {
		return info, err
	}
	if err := s.ask(ctx, key, true); err != nil {
		return snapshots.Info{}, fmt.Errorf("stat %q: %w", key, err)
	}
	return s.withState(info), nil
}

// Usage returns disk space and inodes: of a committed snapshot as Commit
// counted them, of another by counting now. What is gone uses nothing.
func (s *Snapshotter) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	if err := checkName("key", key); err != nil {
		return snapshots.Usage{}, err
	}
	usage, err := s.overlay.Usage(ctx, key)
	if isNotExist(err) {
		return snapshots.Usage{}, nil
	}
	return usage, err
}

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
	for _, info := range rows {
		if info.Kind == snapshots.KindCommitted {
			info = s.withState(info) // as Stat, but nobody is kept waiting
		}
		if err := fn(ctx, info); err != nil {
			return err
		}
	}
	return nil
}

// Close ends the background work, notes a clean stop, and releases the root.
// Nothing is deleted, and no row changes: a restart goes on where this process
// stopped.
func (s *Snapshotter) Close() error {
	s.stop()
	s.running.Wait()
	s.closing.Do(s.sayGoodbye)
	return errors.Join(s.closeCursors(), s.overlay.Close()) // closes the database too
}

func (s *Snapshotter) closeCursors() (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range s.actives {
		err = errors.Join(err, a.cursor.Close())
	}
	clear(s.actives)
	return err
}

func (s *Snapshotter) snapshotsDir() string { return filepath.Join(s.cfg.Root, "snapshots") }
func (s *Snapshotter) removingDir() string  { return filepath.Join(s.cfg.Root, "removing") }
func (s *Snapshotter) healingDir() string   { return filepath.Join(s.cfg.Root, "healing") }
func (s *Snapshotter) replacedDir() string  { return filepath.Join(s.cfg.Root, "replaced") }
func (s *Snapshotter) emptyDir() string     { return filepath.Join(s.cfg.Root, "empty") }

// dir is the directory of a snapshot.
func (s *Snapshotter) dir(id uint64) string { return snapshotDir(s.cfg.Root, id) }

func snapshotDir(root string, id uint64) string {
	return filepath.Join(root, "snapshots", strconv.FormatUint(id, 10))
}

// lockKey waits for other operations on key and returns the unlock. The
// caller's context is asked afterwards: whoever gave up while waiting gets no
// work done in his name.
func (s *Snapshotter) lockKey(ctx context.Context, key string) (func(), error) {
	s.keys.Lock(key)
	unlock := func() { _ = s.keys.Unlock(key) } // fails only for a lock that nobody holds
	if err := ctx.Err(); err != nil {
		unlock()
		return nil, err
	}
	return unlock, nil
}

// bootID names this boot of the kernel (random(4)).
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

func newRunID() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails since Go 1.24
	return hex.EncodeToString(b[:])
}
