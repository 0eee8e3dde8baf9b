package boot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/published"
	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/pulls"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// Options describe a run.
type Options struct {
	Layers  []int // how many a node has
	Rounds  int   // boots of each kind
	FS      string
	Disk    string // a kind, see pulls.Disks
	Command string // for the report
	Log     func(format string, args ...any)
}

// patience is how long a boot may take.
const patience = 15 * time.Minute

// Run measures. It must be called within kit.Main, of a program that calls pulls.Init. An error may
// come with what has been measured until then.
func Run(ctx context.Context, o Options) (*Report, error) {
	o.Log("build the daemon and containerd (minutes the first time)")
	bins, err := kit.Build(ctx)
	if err != nil {
		return nil, err
	}
	r := &Report{FS: o.FS, Disk: o.Disk, Rounds: o.Rounds}
	if r.Origin, err = published.Describe(ctx, bins, Schema, o.Command); err != nil {
		return nil, err
	}
	for _, layers := range slices.Sorted(slices.Values(o.Layers)) {
		if err := r.measure(ctx, o, bins, layers); err != nil {
			return r, fmt.Errorf("with %d layers: %w", layers, err)
		}
	}
	return r, nil
}

func (r *Report) measure(ctx context.Context, o Options, bins kit.Binaries, layers int) (err error) {
	dir, err := os.MkdirTemp("", "boot-")
	if err != nil {
		return err
	}
	n := &node{dir: dir, kind: o.Disk}
	defer func() { err = errors.Join(err, n.close(), os.RemoveAll(dir)) }()
	o.Log("fill a disk with %d layers", layers)
	if err := n.fill(ctx, bins, o.FS, layers); err != nil {
		return err
	}
	if err := n.run(ctx); err != nil {
		return err
	}
	for round := range o.Rounds {
		for i := range variants {
			variant := variants[(round+i)%len(variants)]
			boot, err := n.boot(ctx, variant, round)
			if err != nil {
				return fmt.Errorf("%s: %w", variant, err)
			}
			o.Log("round %d/%d  %5d layers  %-26s socket %.2f s, pause image %.2f s, one more %.2f s, three %.2f s, all %.2f s, all verified %.2f s",
				round+1, o.Rounds, layers, variant, boot.Socket, boot.Pause, boot.Pod, boot.Pods, boot.Images, boot.Verified)
			r.Boots = append(r.Boots, boot)
		}
	}
	return nil
}

// run makes the containers of before the boot with both programs: ten pods, each with one of
// the pause image and one of its own. Then both are stopped in order.
func (n *node) run(ctx context.Context) error {
	for _, p := range []program{ours{n.daemon}, theirs{n.stock}} {
		if err := n.launch(ctx, p); err != nil {
			return err
		}
		sn, err := p.Snapshotter()
		if err != nil {
			return err
		}
		for pod := range 10 {
			for i, image := range []string{n.pause, n.images[pod%len(n.images)]} {
				if _, err := sn.Prepare(ctx, fmt.Sprintf("k8s.io/%d/container-%d-%d", pod, pod, i), image); err != nil {
					return err
				}
			}
		}
		if err := errors.Join(sn.Close(), n.stop(p)); err != nil {
			return err
		}
	}
	return nil
}

// boot is one boot of a kind, after which the program is stopped in order.
func (n *node) boot(ctx context.Context, variant string, round int) (b Boot, err error) {
	p := program(ours{n.daemon})
	if variant == Overlayfs {
		p = theirs{n.stock}
	}
	if variant == Cut {
		if err := n.launch(ctx, p); err != nil {
			return b, err
		}
		n.running = nil
		if err := errors.Join(p.Kill(), os.Remove(p.socket()), kit.NewBoot()); err != nil {
			return b, err
		}
	}
	if err := n.disk.Cold(); err != nil {
		return b, err
	}
	logged, err := size(n.daemon.LogPath())
	if err != nil {
		return b, err
	}
	before, err := pulls.BytesRead(n.disk.Device())
	if err != nil {
		return b, err
	}
	probe, err := pulls.StartProbe(n.disk.Path("probe"))
	if err != nil {
		return b, err
	}
	b = Boot{Layers: n.layers, Entries: n.entries, Variant: variant}
	began := time.Now()
	err = n.use(ctx, p, round, began, &b)
	if err == nil && variant == Cut {
		b.Verified, err = n.verified(ctx, logged, began)
	}
	latency, e := probe.End()
	b.Fdatasync = latency
	after, e2 := pulls.BytesRead(n.disk.Device())
	b.Read = after - before
	if err = errors.Join(err, e, e2); err != nil {
		return b, fmt.Errorf("%w\n%s", err, p.LogTail(4096))
	}
	return b, n.stop(p)
}

// launch starts a program, and waits for its socket.
func (n *node) launch(ctx context.Context, p program) error {
	began := time.Now()
	if err := p.Launch(); err != nil {
		return err
	}
	n.running = p
	for kit.Answers(p.socket()) != nil {
		if !p.Running() || time.Since(began) > patience || ctx.Err() != nil {
			return errors.New("the socket does not answer")
		}
		time.Sleep(500 * time.Microsecond)
	}
	return nil
}

// stop stops a program in order.
func (n *node) stop(p program) error {
	n.running = nil
	return p.Stop()
}

// use starts a program, and does what containerd and the kubelet do first.
func (n *node) use(ctx context.Context, p program, round int, began time.Time, b *Boot) (err error) {
	if err := n.launch(ctx, p); err != nil {
		return err
	}
	b.Socket = time.Since(began).Seconds()
	sn, err := p.Snapshotter()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sn.Close()) }()
	ctx, stop := context.WithTimeout(ctx, patience)
	defer stop()
	var keys []string
	container := func(image string) error {
		keys = append(keys, fmt.Sprintf("k8s.io/%d/new-%d-%d", round, round, len(keys)))
		_, err := sn.Prepare(ctx, keys[len(keys)-1], image)
		return err
	}
	if err := container(n.pause); err != nil {
		return err
	}
	b.Pause = time.Since(began).Seconds()
	for i, image := range n.images[:3] {
		if err := container(image); err != nil {
			return err
		}
		if i == 0 {
			b.Pod = time.Since(began).Seconds()
		}
	}
	b.Pods = time.Since(began).Seconds()
	answers := make(chan error)
	for _, image := range n.images {
		go func() {
			_, err := sn.Stat(ctx, image)
			answers <- err
		}()
	}
	for range n.images {
		err = errors.Join(err, <-answers)
	}
	if err != nil {
		return err
	}
	b.Images = time.Since(began).Seconds()
	for _, key := range keys {
		if err := sn.Remove(ctx, key); err != nil {
			return err
		}
	}
	return nil
}

// verified waits for the daemon's log to have, after an offset, that all layers were verified.
func (n *node) verified(ctx context.Context, offset int64, began time.Time) (float64, error) {
	for {
		text, err := os.ReadFile(n.daemon.LogPath())
		if err != nil {
			return 0, err
		}
		if strings.Contains(string(text[offset:]), "all layers were verified") {
			return time.Since(began).Seconds(), nil
		}
		if !n.daemon.Running() || time.Since(began) > patience || ctx.Err() != nil {
			return 0, errors.New("not all layers were verified")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// size is that of a file; 0 if there is none.
func size(file string) (int64, error) {
	st, err := os.Stat(file)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}
