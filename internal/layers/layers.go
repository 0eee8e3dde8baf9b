package layers

import (
	"context"
	"sync"
	"sync/atomic"

	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
	"github.com/durable-snapshotter/durable-snapshotter/internal/gate"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/marks"
	"github.com/durable-snapshotter/durable-snapshotter/internal/scrub"
	"github.com/durable-snapshotter/durable-snapshotter/internal/unpack"
	"github.com/durable-snapshotter/durable-snapshotter/overlayutil"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Config is what Layers works with, and whom it notifies. The functions must
// not call back, nor take long; OnDamaged, OnReady and OnBrake may be nil.
type Config struct {
	Root  layout.Root
	Gate  *gate.Gate
	Keys  *Keys        // shared with those who remove and commit snapshots
	Blobs blobs.Source // out of which damaged layers are extracted again

	BootID, RunID string // of the kernel's boot and of this process

	MountOptions []string              // of overlay mounts
	Features     *overlayutil.Features // of the kernel; not changed

	Replaced  Replaced
	Scrub     scrub.Config
	OnDamaged func(*DamagedError)
	OnReady   func(storage.CommitEntry)
	OnBrake   func(reason string)
	// OnOutside is called with a layer that was healed out of a blob which the content
	// store does not have. It may be nil.
	OnOutside func(storage.CommitEntry, blobs.Blob)
	// WarnOnce logs a warning, once per key.
	WarnOnce func(ctx context.Context, key string, fields log.Fields, message string)
}

// Layers is what is known of the committed layers of a root. It may be used from
// many goroutines.
type Layers struct {
	*table
	*recorder
	healer    healer
	inherited inheritance
	digester  digester

	cfg    Config
	gate   *gate.Gate
	blobs  blobs.Source
	unpack *unpack.Unpacker

	waiting   atomic.Int64  // callers of ensureReady with something to wait for
	verifying chan struct{} // bounds the layers that are verified at a time
	healing   chan struct{} // and those that are extracted

	background context.Context
	stop       context.CancelFunc
	running    sync.WaitGroup
	closing    sync.Once
	examined   sync.Once // before anything is dropped
}

// New returns the layers of a root, of which nothing is known before Recover.
// The log of ctx is used for the work in the background.
func New(ctx context.Context, cfg Config) *Layers {
	s := &Layers{
		cfg: cfg, gate: cfg.Gate, blobs: cfg.Blobs,
		verifying: make(chan struct{}, 4), healing: make(chan struct{}, 1),
	}
	s.table = newTable(cfg.Root, cfg.OnBrake, cfg.OnReady)
	s.recorder = &recorder{table: s.table, gate: cfg.Gate, bootID: cfg.BootID, runID: cfg.RunID}
	s.unpack = unpack.New(unpack.Config{
		Root: cfg.Root, Gate: cfg.Gate, Blobs: cfg.Blobs, MountOptions: cfg.MountOptions, Features: cfg.Features,
		Ready: s.Ready, Suspect: s.suspect,
	})
	s.healer = healer{
		table: s.table, recorder: s.recorder, gate: cfg.Gate, root: cfg.Root, keys: cfg.Keys, blobs: cfg.Blobs,
		unpack: s.unpack, replaced: cfg.Replaced, bootID: cfg.BootID, runID: cfg.RunID,
	}
	s.inherited = inheritance{
		table: s.table, unpack: s.unpack, root: cfg.Root, space: overlayutil.SpaceOf(cfg.MountOptions),
		suspect: s.suspect, warnOnce: cfg.WarnOnce,
	}
	s.digester = digester{
		table: s.table, recorder: s.recorder, gate: cfg.Gate, root: cfg.Root, keys: cfg.Keys, bootID: cfg.BootID, rate: cfg.Scrub.Rate,
	}
	s.background, s.stop = context.WithCancel(context.WithoutCancel(ctx))
	return s
}

// Watch lets the gate probe, and writes what was found into the journal, in the
// background.
func (s *Layers) Watch() {
	s.running.Go(func() {
		s.gate.Watch(s.background, s.table.flushSoon, func(ctx context.Context) { _ = s.recorder.flush(ctx) }) // or at the next turn
	})
}

// Run verifies, heals, digests and scrubs layers in the background, until Stopping.
func (s *Layers) Run() {
	s.running.Go(func() { s.verifyAll(s.background) })
	s.running.Go(func() { s.digester.digestAll(s.background) })
	if s.cfg.Scrub.Interval > 0 {
		s.running.Go(func() { s.cfg.Scrub.Run(s.background, s.gate, s) })
	}
}

// Stopping ends the background work and the waiting for it: a call that waits until
// a layer was verified or healed returns Unavailable at once. It returns immediately
// and may be called again; Close follows it.
func (s *Layers) Stopping() { s.stop() }

// Close notes a clean stop when the background work has ended, or ctx has.
func (s *Layers) Close(ctx context.Context) {
	s.Stopping()
	ended := make(chan struct{})
	go func() { s.running.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-ctx.Done():
		log.G(s.background).Warn("background work did not end in time, and is left to the next start")
	}
	s.closing.Do(func() { s.recorder.recordCleanStop(context.WithoutCancel(s.background)) })
}

// Normalizer is unpack.Unpacker's, for a tree that is going to be committed.
func (s *Layers) Normalizer(ctx context.Context, t unpack.Tree) (*marks.Normalizer, error) {
	return s.unpack.Normalizer(ctx, t)
}

// RootBelow is unpack.Unpacker's, for a parent that was not known at Prepare.
func (s *Layers) RootBelow(ctx context.Context, parent string) (bool, error) {
	return s.unpack.RootBelow(ctx, parent)
}
