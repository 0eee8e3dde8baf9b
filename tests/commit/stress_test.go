package commit

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

var stress = flag.Duration("stress", 20*time.Second, "how long TestStress lets its workers work")

const (
	workers = 200
	// patience is what a call may take before it is called a deadlock. A
	// Commit waits for those before it, and each of them for the disk.
	patience = 2 * time.Minute
)

// racing builds the daemon with the race detector, which needs a C compiler.
func racing(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "durable-snapshotter-race")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-race", "-buildvcs=false", "-o", path, "./cmd/durable-snapshotter")
	cmd.Dir, cmd.Env = product(t), append(os.Environ(), "CGO_ENABLED=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build with the race detector: %v: %s", err, out)
	}
	return path
}

// TestStress has many workers at one daemon, and compares what it has with
// the answers they got: when all are done, after a SIGKILL in the middle of their work,
// and when they have removed everything.
func TestStress(t *testing.T) {
	disk := newDisk(t, kit.DiskOptions{FS: "ext4", Size: 4 << 30})
	d := newDaemon(t, kit.DaemonOptions{Binary: racing(t), Dir: disk.Path("durable"), Env: []string{"GORACE=halt_on_error=0"}})
	check(t, d.Start(t.Context()))
	crew := newCrew(t, d)
	idle := descriptors(t, d)
	// Those that are closed at this moment do not count.
	for begin := time.Now(); time.Since(begin) < time.Second; time.Sleep(20 * time.Millisecond) {
		idle = min(idle, descriptors(t, d))
	}

	crew.work(t, *stress)
	crew.agrees(t, "after the work")
	waitFor(t, 30*time.Second, func() error {
		// One for each active snapshot, to know of the errors of the disk.
		if now, want := descriptors(t, d), idle+crew.actives(); now != want {
			return fmt.Errorf("the daemon has %d descriptors, want %d: %d and %d of active snapshots", now, want, idle, want-idle)
		}
		return nil
	})

	go func() {
		time.Sleep(3 * time.Second) // any instant will do
		_ = d.Kill()
	}()
	crew.work(t, time.Minute)
	if d.Running() {
		t.Fatal("the daemon was not killed")
	}
	check(t, d.Start(t.Context()))
	crew.connect(t)
	crew.settle(t)
	crew.agrees(t, "after SIGKILL in the middle of the work")

	crew.removeAll(t)
	crew.agrees(t, "when all is removed")
	if names := list(t, d.Root, "snapshots"); len(names) > 0 {
		t.Errorf("directories left: %v", names)
	}
	check(t, d.Stop())
	log := must[string](t)(d.Log())
	for _, bad := range []string{"DATA RACE", "panic: ", "fatal error: "} {
		if _, after, found := strings.Cut(log, bad); found {
			t.Errorf("the log has %q: %.4000s", bad, after)
		}
	}
}

// descriptors counts the open files of the daemon.
func descriptors(t *testing.T, d *kit.Daemon) int {
	t.Helper()
	return len(list(t, "/proc", fmt.Sprint(d.PID()), "fd"))
}

// crew are the workers. Each has its own snapshots, and all of them the names
// that they race for.
type crew struct {
	daemon  *kit.Daemon
	clients []snapshots.Snapshotter
	workers []*worker

	mu   sync.Mutex // guards took
	took map[string]*worker
}

func newCrew(t *testing.T, d *kit.Daemon) *crew {
	t.Helper()
	c := &crew{daemon: d, took: map[string]*worker{}}
	for i := range workers {
		c.workers = append(c.workers, &worker{crew: c, number: i, random: rand.New(rand.NewPCG(1, uint64(i))), have: map[string]*thing{}})
	}
	c.connect(t)
	return c
}

// connect opens connections, each for many workers.
func (c *crew) connect(t *testing.T) {
	t.Helper()
	c.clients = nil
	for range 4 {
		sn := kittest.Connect(t, c.daemon)
		check(t, sn.Walk(t.Context(), func(context.Context, snapshots.Info) error { return nil }))
		c.clients = append(c.clients, sn)
	}
	for i, w := range c.workers {
		w.sn = c.clients[i%len(c.clients)]
	}
}

// work returns when the time is over or the daemon has ended.
func (c *crew) work(t *testing.T, limit time.Duration) {
	t.Helper()
	ctx, stop := context.WithTimeout(t.Context(), limit)
	defer stop()
	go func() {
		select {
		case <-c.daemon.Done():
			stop()
		case <-ctx.Done():
		}
	}()
	var running sync.WaitGroup
	before := 0
	for _, w := range c.workers {
		before += w.calls
		running.Go(func() { w.work(ctx) })
	}
	running.Wait()
	calls := -before
	for _, w := range c.workers {
		calls += w.calls
		for _, err := range w.wrong {
			t.Errorf("worker %d: %v", w.number, err)
		}
		w.wrong = nil
	}
	t.Logf("%d calls", calls)
}

func (c *crew) actives() (n int) {
	for _, w := range c.workers {
		for _, s := range w.have {
			if s.kind == snapshots.KindActive {
				n++
			}
		}
	}
	return n
}

// agrees compares the model with the daemon and its directories.
func (c *crew) agrees(t *testing.T, when string) {
	t.Helper()
	want := map[string]*thing{}
	for _, w := range c.workers {
		for name, s := range w.have {
			want[name] = s
		}
	}
	have := map[string]snapshots.Info{}
	check(t, c.clients[0].Walk(t.Context(), func(_ context.Context, info snapshots.Info) error {
		have[info.Name] = info
		return nil
	}))
	r := kittest.Inspect(t, c.daemon)
	for name, s := range want {
		info, ok := have[name]
		if !ok || info.Kind != s.kind || info.Parent != s.parent {
			t.Errorf("%s: %s is there: %t, %v on %q; want %v on %q", when, name, ok, info.Kind, info.Parent, s.kind, s.parent)
			continue
		}
		if row, _ := r.Find(name); s.content != "" {
			path := filepath.Join(c.daemon.LayerDir(row.ID), "content")
			if got, err := os.ReadFile(path); err != nil || string(got) != s.content {
				t.Errorf("%s: %s holds %q, %v; want %q", when, name, got, err, s.content)
			}
		}
	}
	for name, info := range have {
		if want[name] == nil {
			t.Errorf("%s: %v %s is there, and no worker has it", when, info.Kind, name)
		}
	}
	cleanUp(t, c.clients[0])
	noOrphans(t, c.daemon)
	t.Logf("%s: %d snapshots, %d of them active", when, len(want), c.actives())
}

// settle finds out the outcome of the calls that were not answered.
func (c *crew) settle(t *testing.T) {
	t.Helper()
	unknown, happened := 0, 0
	for _, w := range c.workers {
		if w.pending == nil || w.pending.done == nil {
			w.pending = nil
			continue
		}
		unknown++
		_, err := w.sn.Stat(t.Context(), w.pending.shows)
		if (err == nil) == w.pending.appears {
			happened++
			w.pending.done()
		}
		w.pending = nil
	}
	t.Logf("%d calls were not answered, %d of them happened", unknown, happened)
	if unknown == 0 {
		t.Error("the daemon was not killed in the middle of the work")
	}
}

func (c *crew) removeAll(t *testing.T) {
	t.Helper()
	var running sync.WaitGroup
	for _, w := range c.workers {
		running.Go(func() {
			for len(w.have) > 0 {
				for name := range w.have {
					if w.children(name) > 0 {
						continue
					}
					if err := w.sn.Remove(t.Context(), name); err != nil {
						t.Errorf("remove %s: %v", name, err)
					}
					delete(w.have, name)
				}
			}
		})
	}
	running.Wait()
}
