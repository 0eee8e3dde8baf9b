package pulls

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// erofsConfig makes containerd's transfer service unpack for its erofs snapshotter.
const erofsConfig = `[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = 'linux'
  snapshotter = 'erofs'
  differ = 'erofs'
`

// session is containerd and, for durable, the daemon, from their start to their end.
type session struct {
	variant Variant
	setting Setting
	disk    *machineDisk
	bins    kit.Binaries
	node    *kit.Node
	dir     string // of the sockets
	pids    []int
}

// start starts what a variant needs for a pull. Whether containerd uses igzip is in the
// environment. The daemon uses igzip only if its configuration names it, which here it does not.
func start(ctx context.Context, v Variant, d *machineDisk, bins kit.Binaries, s Setting, profiled bool) (_ *session, err error) {
	// containerd takes unpigz when there is no igzip, which would be a third way.
	if err := os.Setenv("CONTAINERD_DISABLE_PIGZ", "1"); err != nil {
		return nil, err
	}
	if err := os.Setenv("CONTAINERD_DISABLE_IGZIP", strconv.FormatBool(!s.Igzip)); err != nil {
		return nil, err
	}
	x := &session{variant: v, setting: s, disk: d, bins: bins}
	if x.dir, err = scratch("run"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, x.kill())
		}
	}()
	o := kit.NodeOptions{
		Binaries: bins, Dir: x.dir, Volume: d.Path(), BuiltIn: !v.daemon, Heals: v.daemon, Notifies: v.daemon,
		Containerd: kit.ContainerdOptions{Unpacks: s.Unpacks, LogLevel: "info"},
		Daemon:     kit.DaemonOptions{LogLevel: "info"},
	}
	if v.differ {
		o.Containerd.Differ = []string{v.snapshotter}
	}
	if v.snapshotter == "erofs" {
		o.Containerd.Extra = erofsConfig
	}
	if profiled {
		o.Daemon.Config = "[admin]\npprof = true\n"
	}
	if x.node, err = kit.NewNode(o); err != nil {
		return nil, err
	}
	if err := x.node.Start(ctx); err != nil {
		return nil, err
	}
	x.pids = []int{x.node.Containerd.PID()}
	if v.daemon {
		x.pids = append(x.pids, x.node.Daemon.PID())
	}
	if err := x.settle(ctx); err != nil {
		return nil, err
	}
	return x, d.Sync()
}

// stop ends the processes in the orderly way.
func (x *session) stop() error {
	var errs []error
	if x.node.Containerd != nil {
		errs = append(errs, x.node.Containerd.Stop())
	}
	if x.node.Daemon != nil {
		errs = append(errs, x.node.Daemon.Stop())
	}
	return errors.Join(append(errs, x.node.Close(), os.RemoveAll(x.dir))...)
}

func (x *session) kill() error {
	var err error
	if x.node != nil {
		err = x.node.Close()
	}
	return errors.Join(err, os.RemoveAll(x.dir))
}

// pullLimit ends a pull that would not end the run in any useful time.
const pullLimit = 15 * time.Minute

// pull runs ctr image pull, or the fetch alone, and returns its processor time in seconds.
func (x *session) pull(ctx context.Context, ref string) (cpu float64, err error) {
	switch {
	case x.variant.fetches:
		return x.fetch(ctx, ref)
	case x.variant.local:
		return x.ctr(ctx, "image", "pull", "--plain-http", "--snapshotter", x.variant.snapshotter, "--local", "--sync-fs", ref)
	}
	return x.ctr(ctx, "image", "pull", "--plain-http", "--snapshotter", x.variant.snapshotter, ref)
}

// fetch runs ctr content fetch, and returns its processor time in seconds.
func (x *session) fetch(ctx context.Context, ref string) (cpu float64, err error) {
	return x.ctr(ctx, "content", "fetch", "--plain-http", ref)
}

// fetchBefore fetches an image, and leaves nothing of it to be done while its pull is measured.
func (x *session) fetchBefore(ctx context.Context, ref string) error {
	if _, err := x.fetch(ctx, ref); err != nil {
		return err
	}
	if _, err := x.idle(ctx); err != nil {
		return err
	}
	return x.disk.Sync()
}

// ctr runs ctr, and returns its processor time in seconds.
func (x *session) ctr(ctx context.Context, args ...string) (cpu float64, err error) {
	ctx, cancel := context.WithTimeout(ctx, pullLimit)
	defer cancel()
	args = append([]string{"--address", x.node.Containerd.Address, "--namespace", x.node.Namespace()}, args...)
	cmd := exec.CommandContext(ctx, x.bins.Ctr, args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr // without the progress, which goes to the standard output
	if err := errors.Join(cmd.Run(), ctx.Err()); err != nil {
		return 0, fmt.Errorf("ctr: %w: %s\n%s", err, stderr.String(), x.node.Containerd.LogTail(2000))
	}
	return (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds(), nil
}

// measure pulls an image, which may be fetched before, and removes it.
func (x *session) measure(ctx context.Context, ref string, fetched bool, neighbor int64) (p Pull, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("pull of %s with %s: %w", ref, x.variant.Name, err)
		}
	}()
	if fetched {
		if err := x.fetchBefore(ctx, ref); err != nil {
			return p, err
		}
	}
	beside, err := x.beside(neighbor)
	if err != nil {
		return p, err
	}
	for _, pid := range x.pids {
		if err := resetPeak(pid); err != nil {
			return p, err
		}
	}
	cpu, err := kit.ProcessorTime(x.pids...)
	if err != nil {
		return p, err
	}
	before, err := counted(x.disk.Device())
	if err != nil {
		return p, err
	}
	began := time.Now()
	ctr, err := x.pull(ctx, ref)
	p.Seconds = time.Since(began).Seconds()
	if err = errors.Join(err, beside.end(&p)); err != nil {
		return p, err
	}
	cpuPulled, err := kit.ProcessorTime(x.pids...)
	if err != nil {
		return p, err
	}
	began = time.Now()
	if err := x.disk.Sync(); err != nil {
		return p, err
	}
	p.Sync = time.Since(began).Seconds()
	after, err := counted(x.disk.Device())
	if err != nil {
		return p, err
	}
	t := after.since(before)
	p.Writes, p.Bytes, p.Flushes = t.writes, t.bytes, t.flushes
	cpuIdle, err := x.idle(ctx)
	if err != nil {
		return p, err
	}
	p.CPU, p.Later = ctr+cpuPulled-cpu, cpuIdle-cpuPulled
	if p.ContainerdMemory, err = kit.Memory(x.pids[0], "VmHWM"); err != nil {
		return p, err
	}
	if x.variant.daemon {
		if p.DaemonMemory, err = kit.Memory(x.pids[1], "VmHWM"); err != nil {
			return p, err
		}
		all, err := x.node.Daemon.Metrics(ctx)
		m := daemonMetrics(all)
		if x.variant.base && errors.Is(err, kit.ErrNotServed) {
			return p, x.remove(ctx, ref) // of a revision that had no metrics yet
		}
		if err != nil {
			return p, err
		}
		if p.Commits, err = m.commits(); err != nil {
			return p, err
		}
		p.Phases = m.phases()
		if err := x.asConfigured(m); err != nil {
			return p, err
		}
	}
	return p, x.remove(ctx, ref)
}

// asConfigured fails when the daemon has not done what the variant and the setting are about.
func (x *session) asConfigured(m daemonMetrics) error {
	if bytes := m.extracted(); x.variant.differ != (bytes > 0) {
		return fmt.Errorf("the daemon has extracted %.0f bytes by itself, with the setting %+v", bytes, x.setting)
	}
	return nil
}

// idle waits until the processes have used no processor time for a while, and returns all that
// they have used.
func (x *session) idle(ctx context.Context) (float64, error) {
	const pause, limit = 150 * time.Millisecond, 30 * time.Second
	last := -1.0
	for start := time.Now(); ; {
		now, err := kit.ProcessorTime(x.pids...)
		if err != nil || now-last < 2.0/kit.Ticks || time.Since(start) > limit {
			return now, err
		}
		last = now
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
}

// settle waits until the programs have done what they do at their start, which is not part of
// a pull: a daemon that has reached containerd has it collect its garbage.
func (x *session) settle(ctx context.Context) error {
	for begin := time.Now(); x.variant.daemon; time.Sleep(10 * time.Millisecond) {
		all, err := x.node.Daemon.Metrics(ctx)
		m := daemonMetrics(all)
		if x.variant.base && errors.Is(err, kit.ErrNotServed) {
			break // of a revision that had no metrics yet
		}
		if err != nil {
			return err
		}
		if m.reachesContainerd() {
			break
		}
		if time.Since(begin) > 10*time.Second {
			return errors.New("the daemon has not reached containerd within 10 s")
		}
	}
	_, err := x.idle(ctx)
	return err
}

// remove makes the disk what it was before the pull, and fails when containerd has anything left.
func (x *session) remove(ctx context.Context, ref string) error {
	for _, args := range [][]string{{"image", "rm", "--sync", ref}, {"content", "prune", "references"}} {
		if _, err := x.node.Ctr(ctx, args...); err != nil {
			return err
		}
	}
	ctx, cl, err := x.node.Client(ctx)
	if err != nil {
		return err
	}
	defer cl.Close()
	var left []string
	err = cl.ContentStore().Walk(ctx, func(i content.Info) error {
		left = append(left, i.Digest.String())
		return nil
	})
	if err == nil {
		err = cl.SnapshotService(x.variant.snapshotter).Walk(ctx, func(_ context.Context, i snapshots.Info) error {
			left = append(left, i.Name)
			return nil
		})
	}
	if err != nil {
		return err
	}
	if len(left) > 0 {
		slices.Sort(left)
		return fmt.Errorf("after the removal of the image containerd still has %v", left)
	}
	return x.disk.Sync()
}

// beside is what runs beside a pull.
type beside struct {
	neighbor *Neighbor
	probe    *child
}

// beside starts the neighbor, if there is to be one, and what measures its effects.
func (x *session) beside(rate int64) (b beside, err error) {
	if rate == 0 {
		return b, nil
	}
	if b.neighbor, err = StartNeighbor(x.disk.Path("neighbor"), rate); err != nil {
		return b, err
	}
	time.Sleep(time.Second) // until there are dirty pages
	if b.probe, err = startChild("probe", x.disk.Path("probe"), x.node.Containerd.Address, x.node.Namespace()); err != nil {
		_, e := b.neighbor.End()
		return b, errors.Join(err, e)
	}
	return b, nil
}

// end ends both, and adds what they have found to a pull.
func (b beside) end(p *Pull) error {
	if b.neighbor == nil {
		return nil
	}
	var probed probeFound
	err := b.probe.end(&probed)
	rate, e := b.neighbor.End()
	p.NeighborRate, p.Fdatasync, p.Lease = rate, probed.Fdatasync, probed.Lease
	return errors.Join(err, e)
}
