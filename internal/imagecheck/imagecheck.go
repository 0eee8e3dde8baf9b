// Package imagecheck connects package images with the layers of a running snapshotter. [Run]
// has the daemon check every image of containerd after an unclean shutdown of the machine, and
// repair it as far as the configuration allows; [Check] reports what is known.
package imagecheck

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
	"github.com/durable-snapshotter/durable-snapshotter/internal/images"
	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
)

// The values of Config.Repair.
const (
	Off   = "off"   // nothing is checked
	Heal  = "heal"  // damaged layers are healed
	Fetch = "fetch" // also, bad blobs are deleted, and fetched if Registry allows it
	Full  = "full"  // also, layers are unpacked again; with DropImages everything
)

// Config is how containerd is reached, and what may be done to its images.
type Config struct {
	Address     string       // of containerd's socket; "": there is none
	Socket      string       // of this snapshotter, by which containerd's configuration names it
	Snapshotter string       // its name there, if there are several
	ContentRoot string       // as configured
	Archives    blobs.Source // see images.Options
	Repair      string
	Registry    bool   // see images.RepairOptions
	Hosts       string // likewise
	DropImages  bool   // images that nothing can repair are dropped
}

// Name returns the name under which a containerd has this snapshotter.
func (c Config) Name(ctx context.Context, conn *repull.Containerd) (string, error) {
	names, err := conn.Served(ctx, c.Socket)
	if err != nil {
		return "", err
	}
	if slices.Contains(names, c.Snapshotter) {
		return c.Snapshotter, nil
	}
	return names[0], nil
}

// options are what the configuration allows.
func (c Config) options(r *rows) images.RepairOptions {
	o := images.RepairOptions{
		ContentRoot: c.ContentRoot, Registry: c.Registry, Hosts: c.Hosts, Limit: images.ActHeal,
		Heal: r.heal, Confirm: r.confirm,
	}
	switch {
	case c.Repair == Fetch:
		o.Limit = images.ActFetch
	case c.Repair == Full && c.DropImages:
		o.Limit = ""
	case c.Repair == Full:
		o.Limit = images.ActUnpack
	}
	return o
}

// What containerd did not answer is requested again after recheckFirst, then after twice as
// long each time, at most recheckLast; from the beginning when containerd has returned.
const (
	recheckFirst = time.Second
	recheckLast  = 5 * time.Minute
)

// Check examines the images of containerd by what the snapshotter knows of its layers: nothing
// is verified, and nothing is healed.
func Check(ctx context.Context, cfg Config, sn *snapshotter.Snapshotter, o images.Options) ([]images.Image, error) {
	if cfg.Address == "" {
		return nil, errors.New("[containerd] address is empty: only containerd knows the images")
	}
	conn, err := repull.Connect(cfg.Address)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	r := &rows{sn: sn}
	if o.Snapshotter, err = cfg.Name(ctx, conn); err != nil {
		return nil, err
	}
	o.Rows, o.Verify = r.list, r.verify
	o.Blobs, o.Archives = blobs.Open(cfg.ContentRoot), cfg.Archives
	return images.NewChecker(conn, o).Check(ctx)
}

// Run checks the images of containerd once after each unclean shutdown of the machine, and
// repairs them. It waits for containerd, and returns when the state of every image is known, or
// with ctx. A check that was cut short is due at the next start.
func Run(ctx context.Context, cfg Config, sn *snapshotter.Snapshotter) {
	if cfg.Repair == Off || cfg.Address == "" || !sn.Layers().ImagesDue() {
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conn, err := repull.Connect(cfg.Address)
	if err != nil {
		log.G(ctx).WithError(err).Warn("images are not checked")
		return
	}
	defer conn.Close()
	returned := make(chan struct{}, 1)
	go conn.Watch(ctx, func(connected bool) {
		if !connected {
			return
		}
		select {
		case returned <- struct{}{}:
		default:
		}
	})
	r := round{cfg: cfg, rows: &rows{sn: sn, wait: true}, conn: conn, logged: map[string]string{}}
	for pause := recheckFirst; ; pause = min(2*pause, recheckLast) {
		select {
		case <-ctx.Done():
			return
		case <-returned:
			pause = recheckFirst
		case <-time.After(pause):
		}
		if err := r.run(ctx); err == nil || ctx.Err() != nil {
			return
		} else if text := err.Error(); r.logged[""] != text {
			r.logged[""] = text
			log.G(ctx).WithError(err).Info("images are checked later")
		}
	}
}

// round is one check of all images.
type round struct {
	cfg    Config
	rows   *rows
	conn   *repull.Containerd
	logged map[string]string // the last line of each image in the log, and under "" the last error
}

// errUnknown means that the state of some images is not known.
var errUnknown = errors.New("the state of some images is unknown")

// run checks every image, the pinned ones first: without the pause image no pod starts.
func (r *round) run(ctx context.Context) error {
	began := time.Now()
	name, err := r.cfg.Name(ctx, r.conn)
	if err != nil {
		return err
	}
	o := images.Options{
		Snapshotter: name, Rows: r.rows.list, Verify: r.rows.verify,
		Blobs: blobs.Open(r.cfg.ContentRoot), Archives: r.cfg.Archives,
	}
	pinned, err := images.Pinned(ctx, r.conn)
	if err != nil {
		return err
	}
	early := 0
	if o.Names = pinned; len(pinned) > 0 {
		if _, early, err = r.pass(ctx, o); err != nil && !errors.Is(err, images.ErrNotFound) { // deleted meanwhile
			return err
		}
	}
	o.Names = nil
	counts, repaired, err := r.pass(ctx, o)
	if err != nil {
		return err
	}
	fields := log.Fields{"event": "images_checked", "repaired": early + repaired, "took": time.Since(began).String()}
	for verdict, n := range counts {
		fields[string(verdict)] = n
	}
	log.G(ctx).WithFields(fields).Info("all images were checked after an unclean shutdown")
	if counts[images.Unknown] > 0 {
		return errUnknown
	}
	return r.rows.sn.Layers().ImagesChecked(ctx)
}

// pass checks and repairs the selected images, logs one line for each, and counts them.
func (r *round) pass(ctx context.Context, o images.Options) (counts map[images.Verdict]int, repaired int, err error) {
	checker := images.NewChecker(r.conn, o)
	found, err := checker.Check(ctx)
	if err != nil {
		return nil, 0, err
	}
	done, err := checker.Apply(ctx, found, r.cfg.options(r.rows))
	if err != nil {
		return nil, 0, err
	}
	type key struct{ namespace, target, platform string }
	keyOf := func(i images.Image) key { return key{i.Namespace, i.Target.String(), i.Platform} }
	repairs := map[key]images.Repair{}
	for _, d := range done {
		repairs[keyOf(d.Image)] = d
	}
	counts = map[images.Verdict]int{}
	for _, i := range found {
		now, ok := repairs[keyOf(i)]
		if !ok {
			now = images.Repair{Image: i}
		}
		if now.Done != "" {
			repaired++
		}
		if !now.Dropped {
			counts[now.Verdict]++
		}
		r.log(ctx, now)
	}
	return counts, repaired, nil
}

// log logs what has become of an image, unless that is what was logged last.
func (r *round) log(ctx context.Context, i images.Repair) {
	fields := log.Fields{"event": "image_checked", "image": i.Name, "namespace": i.Namespace, "verdict": string(i.Verdict)}
	for name, text := range map[string]string{"platform": i.Platform, "reason": i.Reason, "done": i.Done, "left": i.Blocked} {
		if text != "" {
			fields[name] = text
		}
	}
	if i.Dropped {
		fields["verdict"] = "dropped"
	}
	line, name := fmt.Sprint(fields), i.Namespace+" "+i.Name+" "+i.Platform
	if r.logged[name] == line {
		return
	}
	r.logged[name] = line
	entry := log.G(ctx).WithFields(fields)
	if i.Dropped || i.Verdict.Bad() || i.Verdict == images.Unknown {
		entry.Warn("an image is not ready after an unclean shutdown")
		return
	}
	entry.Info("an image was checked after an unclean shutdown")
}
