package pulls

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
)

// profile pulls once more with each variant that has a daemon, for each setting, and leaves
// profiles of the daemon. These pulls are not on record.
func (r *run) profile(ctx context.Context) error {
	if err := os.MkdirAll(r.Profiles, 0o755); err != nil {
		return err
	}
	for _, row := range r.report.Rows() {
		v := Variants[place(row.Variant)]
		if !v.daemon || v.Name != row.Variant {
			continue // without a daemon, or of the base revision
		}
		name := fmt.Sprintf("%s-%s-%d", row.Variant, row.Image, row.Unpacks)
		if row.Igzip {
			name += "-igzip"
		}
		if err := r.profileOnce(ctx, v, row.Setting, math.Ceil(row.Seconds.Median), filepath.Join(r.Profiles, name)); err != nil {
			return err
		}
		r.Log("profiles %s.*.pprof", filepath.Join(r.Profiles, name))
	}
	return nil
}

func (r *run) profileOnce(ctx context.Context, v Variant, s Setting, seconds float64, file string) error {
	x, err := start(ctx, v, r.disks[v.Name], r.binaries(v), s, true)
	if err != nil {
		return err
	}
	cpu := make(chan error, 1)
	go func() {
		cpu <- x.save(ctx, fmt.Sprintf("/debug/pprof/profile?seconds=%.0f", max(1, seconds)), file+".cpu.pprof")
	}()
	_, err = x.measure(ctx, r.images[s.Image].Ref, r.Fetched, r.Neighbor)
	if err = errors.Join(err, <-cpu); err == nil {
		err = errors.Join(x.save(ctx, "/debug/pprof/block", file+".block.pprof"), x.save(ctx, "/debug/pprof/mutex", file+".mutex.pprof"))
	}
	if err != nil {
		return errors.Join(err, x.kill())
	}
	return x.stop()
}

// save writes what the daemon's admin socket answers to a file.
func (x *session) save(ctx context.Context, path, file string) (err error) {
	resp, err := x.node.Daemon.Get(ctx, path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, resp.Body)
	return errors.Join(err, f.Close())
}
