package pulls

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/published"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// Options describe a run.
type Options struct {
	Images   []string // of ImageNames
	Variants []string // names of Variants
	Igzip    []bool   // settings, see Setting
	Unpacks  []int
	Rounds   int   // that are counted
	Scale    int   // see Report
	Fetched  bool  // see Report
	Neighbor int64 // see Report
	FS       string
	Disk     string // of Disks
	Base     string // a revision, whose daemon takes turns with this one; none when empty
	Store    string // the directory in which images stay
	Profiles string // the directory for profiles of the daemon; none when empty
	Command  string // for the report
	Log      func(format string, args ...any)
}

// run is a run under way.
type run struct {
	Options
	bins     kit.Binaries
	base     kit.Binaries
	variants []Variant
	settings []Setting
	store    *store
	images   map[string]kit.Pushed
	disks    map[string]*machineDisk
	report   *Report
}

// Run measures. It must be called within kit.Main. An error may come with what has been measured
// until then.
func Run(ctx context.Context, o Options) (_ *Report, err error) {
	r := &run{Options: o, images: map[string]kit.Pushed{}, disks: map[string]*machineDisk{}}
	r.Scale = max(1, r.Scale)
	if _, ok := Disks[o.Disk]; !ok {
		return nil, fmt.Errorf("there is no disk %q", o.Disk)
	}
	if err := r.prepare(ctx); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(ctx.Err(), err) // the end of the run explains what failed because of it
		}
		err = errors.Join(err, r.close())
	}()
	if err := r.makeImages(ctx); err != nil {
		return nil, err
	}
	if err := r.makeDisks(); err != nil {
		return nil, err
	}
	for round := range o.Rounds + 1 {
		for _, s := range r.settings {
			if err := r.round(ctx, round, s); err != nil {
				return r.report, err
			}
		}
	}
	if o.Profiles != "" {
		return r.report, r.profile(ctx)
	}
	return r.report, nil
}

// prepare builds the programs, and decides what is measured.
func (r *run) prepare(ctx context.Context) (err error) {
	r.Log("build containerd and the daemon (minutes the first time)")
	if r.bins, err = kit.Build(ctx); err != nil {
		return err
	}
	r.report = &Report{FS: r.FS, Disk: r.Disk, Fetched: r.Fetched, Neighbor: r.Neighbor, Rounds: r.Rounds, Scale: r.Scale}
	if r.report.Origin, err = published.Describe(ctx, r.bins, schema, r.Command); err != nil {
		return err
	}
	if r.variants, r.report.LeftOut, err = choose(r.Variants); err != nil {
		return err
	}
	if why := noIgzip(); why != "" && slices.Contains(r.Igzip, true) {
		r.Igzip = slices.DeleteFunc(slices.Clone(r.Igzip), func(b bool) bool { return b })
		r.report.LeftOut = append(r.report.LeftOut, "igzip: "+why)
	}
	if fetches := func(v Variant) bool { return v.fetches }; r.Fetched && slices.ContainsFunc(r.variants, fetches) {
		r.variants = slices.DeleteFunc(r.variants, fetches)
		r.report.LeftOut = append(r.report.LeftOut, "fetch: every blob is fetched before")
	}
	for _, line := range r.report.LeftOut {
		r.Log("left out: %s", line)
	}
	if r.Base != "" {
		if r.base, r.report.Base, err = buildBase(ctx, r.bins, r.Base); err != nil {
			return err
		}
		for _, v := range slices.Clone(r.variants) {
			if v.daemon {
				v.Name, v.base = v.Name+baseSuffix, true
				r.variants = append(r.variants, v)
			}
		}
	}
	for _, image := range r.Images {
		for _, unpacks := range r.Unpacks {
			for _, igzip := range r.Igzip {
				if igzip && imageShapes[image].compression != kit.Gzip {
					continue // it would change nothing
				}
				r.settings = append(r.settings, Setting{Image: image, Unpacks: unpacks, Igzip: igzip})
			}
		}
	}
	if len(r.settings) == 0 || len(r.variants) == 0 {
		return errors.New("nothing is left to measure")
	}
	return nil
}

func (r *run) makeImages(ctx context.Context) (err error) {
	if r.store, err = openStore(r.Store, r.Scale); err != nil {
		return err
	}
	for _, name := range r.Images {
		r.Log("image %s", name)
		if r.images[name], err = r.store.get(ctx, name); err != nil {
			return err
		}
		r.report.Images = append(r.report.Images, describe(name, r.images[name]))
	}
	return nil
}

// makeDisks makes a disk for each variant, with room for the largest image, for the same once
// more, since small files take whole blocks, and for the neighbor's file.
func (r *run) makeDisks() error {
	const least = 320 << 20 // xfs needs 300 MiB
	size := int64(least)
	for _, i := range r.report.Images {
		size = max(size, least+i.Packed+i.Bytes*3/2)
	}
	if r.Neighbor > 0 {
		size += neighborFile
	}
	size = size >> 20 << 20
	var st unix.Statfs_t
	if err := unix.Statfs(os.TempDir(), &st); err != nil {
		return err
	}
	if free, need := int64(st.Bavail)*st.Bsize, size*int64(len(r.variants)); free < need {
		return fmt.Errorf("%s has %d MiB free, the disks need %d: set TMPDIR to a directory on another file system, or measure fewer variants", os.TempDir(), free>>20, need>>20)
	}
	for i, v := range r.variants {
		dir, err := scratch(fmt.Sprintf("v%d", i))
		if err != nil {
			return err
		}
		d, err := newDisk(dir, r.FS, r.Disk, size)
		if err != nil {
			return fmt.Errorf("disk of %s: %w", v.Name, err)
		}
		r.disks[v.Name] = d
		proof, err := d.prove(r.Disk)
		if err != nil {
			return fmt.Errorf("disk of %s: %w", v.Name, err)
		}
		proof.Variant = v.Name
		r.Log("disk of %s: %s, %d MiB; writes %.0f MB/s in requests of 1 MiB, and %.0f requests of 4 KiB a second", v.Name, d.Device(), size>>20, proof.Bytes/1e6, proof.Requests)
		r.report.Proofs = append(r.report.Proofs, proof)
	}
	return nil
}

// round pulls once with each variant. Round 0 is not on record.
func (r *run) round(ctx context.Context, round int, s Setting) error {
	if err := r.store.warm(r.images[s.Image]); err != nil {
		return err
	}
	for i := range r.variants {
		v := r.variants[(i+round)%len(r.variants)]
		if !v.can(s) {
			continue
		}
		p, err := r.once(ctx, v, s)
		if err != nil {
			return err
		}
		p.Setting, p.Round, p.Variant = s, round, v.Name
		r.Log("round %d/%d  %-10s  unpacks %d  igzip %-5v  %-19s  %6.2f s  %5.2f CPU s  %6d writes  %6.1f MiB", round, r.Rounds, s.Image, s.Unpacks, s.Igzip, v.Name, p.Seconds, p.CPU, p.Writes, float64(p.Bytes)/mib)
		if round > 0 {
			r.report.Pulls = append(r.report.Pulls, p)
		}
	}
	return nil
}

// once is one pull, with processes of its own.
func (r *run) once(ctx context.Context, v Variant, s Setting) (p Pull, err error) {
	x, err := start(ctx, v, r.disks[v.Name], r.binaries(v), s, false)
	if err != nil {
		return p, err
	}
	if p, err = x.measure(ctx, r.images[s.Image].Ref, r.Fetched, r.Neighbor); err != nil {
		return p, errors.Join(err, x.kill())
	}
	return p, x.stop()
}

func (r *run) binaries(v Variant) kit.Binaries {
	if v.base {
		return r.base
	}
	return r.bins
}

func (r *run) close() error {
	var errs []error
	for _, d := range r.disks {
		errs = append(errs, d.Close())
	}
	if r.store != nil {
		errs = append(errs, r.store.registry.Close())
	}
	return errors.Join(errs...)
}

// buildBase builds the daemon of another revision, out of a copy of its tree, so that nothing
// of it stays in the repository.
func buildBase(ctx context.Context, bins kit.Binaries, revision string) (kit.Binaries, string, error) {
	commit, err := published.Git(ctx, "rev-parse", "--verify", revision+"^{commit}")
	if err != nil {
		return bins, "", err
	}
	dir, err := scratch("base")
	if err != nil {
		return bins, "", err
	}
	tree := filepath.Join(dir, "tree.tar")
	if _, err := published.Git(ctx, "archive", "--format=tar", "--output="+tree, commit); err != nil {
		return bins, "", err
	}
	bins.Daemon = filepath.Join(dir, "durable-snapshotter")
	for _, argv := range [][]string{
		{"tar", "-x", "-f", tree},
		{"go", "build", "-trimpath", "-buildvcs=false", "-o", bins.Daemon, "./cmd/durable-snapshotter"},
	} {
		cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return bins, "", fmt.Errorf("build %s: %s: %w: %s", commit, strings.Join(argv, " "), err, out)
		}
	}
	return bins, commit, nil
}
