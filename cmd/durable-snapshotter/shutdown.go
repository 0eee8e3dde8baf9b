package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
	"github.com/durable-snapshotter/durable-snapshotter/internal/images"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layers"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// The values of [images] repair.
const (
	repairOff   = "off"
	repairHeal  = "heal"
	repairFetch = "fetch"
	repairFull  = "full"
)

// What containerd did not answer is requested again after recheckFirst, then after twice as
// long each time, at most recheckLast; from the beginning when containerd has returned.
const (
	recheckFirst = time.Second
	recheckLast  = 5 * time.Minute
)

// repairAfterShutdown checks the images of containerd once after each unclean shutdown of the
// machine, and repairs them as [images] repair allows. It waits for containerd, and returns when
// the state of every image is known, or with ctx. An interrupted check is due at the next start.
func repairAfterShutdown(ctx context.Context, cfg Config, sn *snapshotter.Snapshotter) {
	if cfg.Images.Repair == repairOff || cfg.Containerd.Address == "" || !sn.Layers().ImagesDue() {
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conn, err := repull.Connect(cfg.Containerd.Address)
	if err != nil {
		log.G(ctx).WithError(err).Warn("images are not checked")
		return
	}
	defer conn.Close()
	returned := make(chan struct{}, 1)
	go conn.Watch(ctx, func() {
		select {
		case returned <- struct{}{}:
		default:
		}
	})
	s := shutdownRepair{cfg: cfg, sn: sn, conn: conn, store: blobs.Open(cfg.ContentRoot), archives: cfg.snapshotter().Outside(), logged: map[string]string{}}
	for pause := recheckFirst; ; pause = min(2*pause, recheckLast) {
		select {
		case <-ctx.Done():
			return
		case <-returned:
			pause = recheckFirst
		case <-time.After(pause):
		}
		if err := s.run(ctx); err == nil || ctx.Err() != nil {
			return
		} else if text := err.Error(); s.logged[""] != text {
			s.logged[""] = text
			log.G(ctx).WithError(err).Info("images are checked later")
		}
	}
}

// shutdownRepair is the check of all images after an unclean shutdown.
type shutdownRepair struct {
	cfg    Config
	sn     *snapshotter.Snapshotter
	conn   *repull.Containerd
	layers map[uint64]snapshotter.Layer // of the latest list
	logged map[string]string            // the last line of each image in the log

	store, archives blobs.Source
}

// errUnknownImages means that the state of some images is not known.
var errUnknownImages = errors.New("the state of some images is unknown")

// run checks every image, the pinned ones first: without the pause image no pod starts.
func (s *shutdownRepair) run(ctx context.Context) error {
	began := time.Now()
	name, err := servedAs(ctx, s.conn, s.cfg)
	if err != nil {
		return err
	}
	o := images.Options{Snapshotter: name, Rows: s.list, Verify: s.verify, Blobs: s.store, Archives: s.archives}
	pinned, err := images.Pinned(ctx, s.conn)
	if err != nil {
		return err
	}
	early := 0
	if o.Names = pinned; len(pinned) > 0 {
		if _, early, err = s.pass(ctx, o); err != nil && !errors.Is(err, images.ErrNotFound) { // deleted meanwhile
			return err
		}
	}
	o.Names = nil
	counts, repaired, err := s.pass(ctx, o)
	if err != nil {
		return err
	}
	fields := log.Fields{"event": "images_checked", "repaired": early + repaired, "took": time.Since(began).String()}
	for verdict, n := range counts {
		fields[string(verdict)] = n
	}
	log.G(ctx).WithFields(fields).Info("all images were checked after an unclean shutdown")
	if counts[images.Unknown] > 0 {
		return errUnknownImages
	}
	return s.sn.Layers().ImagesChecked(ctx)
}

// pass checks and repairs the selected images, logs one line for each, and counts them.
func (s *shutdownRepair) pass(ctx context.Context, o images.Options) (counts map[images.Verdict]int, repaired int, err error) {
	checker := images.NewChecker(s.conn, o)
	found, err := checker.Check(ctx)
	if err != nil {
		return nil, 0, err
	}
	done, err := checker.Apply(ctx, found, s.options())
	if err != nil {
		return nil, 0, err
	}
	counts = map[images.Verdict]int{}
	type key struct{ namespace, target, platform string }
	repairs := map[key]images.Repair{}
	for _, r := range done {
		repairs[key{r.Namespace, r.Target.String(), r.Platform}] = r
	}
	for _, i := range found {
		r, ok := repairs[key{i.Namespace, i.Target.String(), i.Platform}]
		if !ok {
			r = images.Repair{Image: i}
		}
		if r.Done != "" {
			repaired++
		}
		if !r.Dropped {
			counts[r.Verdict]++
		}
		s.log(ctx, r)
	}
	return counts, repaired, nil
}

// log logs what has become of an image, unless that is what was logged last.
func (s *shutdownRepair) log(ctx context.Context, r images.Repair) {
	fields := log.Fields{"event": "image_checked", "image": r.Name, "namespace": r.Namespace, "verdict": string(r.Verdict)}
	for name, text := range map[string]string{"platform": r.Platform, "reason": r.Reason, "done": r.Done, "left": r.Blocked} {
		if text != "" {
			fields[name] = text
		}
	}
	if r.Dropped {
		fields["verdict"] = "dropped"
	}
	line := fmt.Sprint(fields)
	if was := s.logged[r.Namespace+" "+r.Name]; was == line {
		return
	}
	s.logged[r.Namespace+" "+r.Name] = line
	entry := log.G(ctx).WithFields(fields)
	if r.Dropped || r.Verdict.Bad() || r.Verdict == images.Unknown {
		entry.Warn("an image is not ready after an unclean shutdown")
		return
	}
	entry.Info("an image was checked after an unclean shutdown")
}

// options are what the configuration allows.
func (s *shutdownRepair) options() images.RepairOptions {
	o := images.RepairOptions{
		ContentRoot: s.cfg.ContentRoot, Heal: s.heal, Confirm: s.confirm,
		Registry: s.cfg.Heal.Registry, Hosts: s.cfg.Heal.Hosts, Limit: images.ActHeal,
	}
	switch s.cfg.Images.Repair {
	case repairFetch:
		o.Limit = images.ActFetch
	case repairFull:
		o.Limit = images.ActUnpack
		if s.cfg.Containerd.DropImages {
			o.Limit = ""
		}
	}
	return o
}

// list returns the rows of this daemon.
func (s *shutdownRepair) list(ctx context.Context) (rows []images.Row, err error) {
	report, err := s.sn.Inspect(ctx)
	if err != nil {
		return nil, err
	}
	rows, s.layers = rowsOf(report)
	return rows, nil
}

// verify waits until the daemon has verified a layer, and has healed it if it can. The error
// is that of ctx.
func (s *shutdownRepair) verify(ctx context.Context, row images.Row) (found verify.Result, removed bool, err error) {
	l, ok := s.layers[row.ID]
	if !ok || l.Name != row.Name {
		return found, true, nil
	}
	err = s.sn.Layers().Wait(ctx, row.Name, true)
	if ctx.Err() != nil {
		return found, false, ctx.Err()
	}
	if errdefs.IsNotFound(err) {
		return found, true, nil
	}
	results := []verify.Result{l.Known}
	s.sn.Layers().Update(results, []storage.CommitEntry{l.CommitEntry})
	return results[0], false, ctx.Err()
}

// heal heals damaged layers as far as the brake allows it, and returns what has become of each.
func (s *shutdownRepair) heal(ctx context.Context, ids []uint64, _ bool) (map[uint64]string, error) {
	done := map[uint64]string{}
	for _, id := range ids {
		l, ok := s.layers[id]
		if !ok {
			continue
		}
		_, key := layout.SplitName(l.Name)
		err := s.sn.Layers().HealNow(ctx, l.Namespace, key)
		if ctx.Err() != nil {
			return done, ctx.Err()
		}
		if done[id] = "healed"; err != nil {
			done[id] = "not healed: " + reasonOf(err)
		}
	}
	return done, nil
}

// reasonOf leaves out of an error what the verdict has already.
func reasonOf(err error) string {
	if damaged := (*layers.DamagedError)(nil); errors.As(err, &damaged) && damaged.Reason != "" {
		return damaged.Reason
	}
	return err.Error()
}

// confirm returns nil only when a layer is damaged still, and nothing can heal it.
func (s *shutdownRepair) confirm(ctx context.Context, row images.Row, _ bool) error {
	l, ok := s.layers[row.ID]
	if !ok || l.Name != row.Name {
		return fmt.Errorf("nothing is removed: snapshot %s has gone meanwhile", row.Name)
	}
	_, key := layout.SplitName(row.Name)
	return s.sn.Layers().ConfirmDamaged(ctx, l.Namespace, key)
}
