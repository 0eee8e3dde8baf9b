package storm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

const (
	lanes  = 4                       // actors at work at the same time, beside one of power
	blow   = 1500 * time.Millisecond // how long the actors of a round begin something new
	unload = 5                       // rounds from one deletion of all leases to the next
	quiet  = 10                      // rounds in which nothing restarts, after as many in which it does
)

// storm is one storm on one node.
type storm struct {
	node     *node
	registry *kit.Registry
	images   []stormImage
	blobs    map[digest.Digest][]byte // good content of the images' layers
	ledger   *ledger
	lane     []actor
	power    []actor
	round    int
	found    map[string]int // violations by kind
	mu       sync.Mutex     // guards found

	pulls, cancelled, excused atomic.Int64 // of actors: succeeded, cut short, failed with an excuse
	final                     int          // pulls after rounds
	pods                      atomic.Int64 // of actors: started
	damaged                   atomic.Bool  // in this round
	broken                    sync.Map     // blobs that are damaged, by digest
	sources                   sources

	idle     int     // goroutines of a daemon that has done nothing
	usage    []usage // of the daemon, after rounds; the first of one that has done nothing
	orphaned int     // committed rows of the daemon that containerd did not know, most at a time
}

// violate records that a promise was broken.
func (s *storm) violate(kind, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	s.ledger.printf("VIOLATION %s: %s", kind, text)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.found[kind]++; s.found[kind] <= 3 {
		fmt.Printf("VIOLATION in round %d, %s: %s\n", s.round, kind, text)
	}
}

// violations describes how many there were, "" when there was none.
func (s *storm) violations() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []string
	for _, kind := range slices.Sorted(maps.Keys(s.found)) {
		all = append(all, fmt.Sprintf("%d %s", s.found[kind], kind))
	}
	return strings.Join(all, ", ")
}

func (s *storm) over() bool { return s.violations() != "" && !*goOn && *snapshotter == durable }

// has reports whether an actor of that name acts.
func (s *storm) has(name string) bool {
	is := func(a actor) bool { return a.name == name }
	return slices.ContainsFunc(s.lane, is) || slices.ContainsFunc(s.power, is)
}

// TestStorm is the storm: see the documentation of the package.
func TestStorm(t *testing.T) {
	if *seed == 0 {
		*seed = uint64(time.Now().UnixNano()) % 1_000_000
	}
	long := fmt.Sprintf("%d rounds on each", *rounds)
	if *duration > 0 {
		long = fmt.Sprintf("%v on all", *duration)
	}
	fmt.Printf("storm of %s, seed %d, %s of %s, actors %q\n", *snapshotter, *seed, long, *fsList, *actorList)
	registry := must[*kit.Registry](t)(kit.StartRegistry(filepath.Join(scratch(t), "registry")))
	t.Cleanup(func() { check(t, registry.Close()) })
	images := must[[]stormImage](t)(pushImages(t.Context(), registry))
	blobs := must[map[digest.Digest][]byte](t)(readBlobs(registry, images))
	kinds := strings.Split(*fsList, ",")
	for i, fs := range kinds {
		// A short storm has one node on each file system, a long one has two.
		modes, each := []int{0, parallel}, length{rounds: *rounds / 2, time: *duration / time.Duration(2*len(kinds))}
		if *duration == 0 && *rounds < 20 || *duration > 0 && *duration < 10*time.Minute {
			modes, each = modes[(i+int(*seed))%2:][:1], length{rounds: *rounds, time: *duration / time.Duration(len(kinds))}
		}
		for _, unpacks := range modes {
			t.Run(fmt.Sprintf("%s,rebase=%v", fs, unpacks > 0), func(t *testing.T) {
				s := &storm{registry: registry, images: images, blobs: blobs, found: map[string]int{}}
				s.run(t, fs, unpacks, each)
			})
			if t.Failed() {
				return
			}
		}
	}
}

// length is how long a storm on one node is: so many rounds, or so much time if that is not zero.
type length struct {
	rounds int
	time   time.Duration
}

// over reports whether a storm that began at some time ends before a round.
func (l length) over(began time.Time, round int) bool {
	if l.time > 0 {
		return time.Since(began) > l.time
	}
	return round > l.rounds
}

// run has a storm on a new node.
func (s *storm) run(t *testing.T, fs string, unpacks int, l length) {
	var err error
	s.lane, err = chosen(laneActors, *actorList)
	check(t, err)
	s.power, err = chosen(powerActors, *actorList)
	check(t, err)
	dir := scratch(t)
	s.ledger, err = newLedger(filepath.Join(dir, "actors.log"))
	check(t, err)
	check(t, s.makeSources(dir))
	s.node, err = newNode(t.Context(), dir, fs, kittest.Binaries(t), unpacks, named(s.images, pause).Ref)
	check(t, err)
	t.Cleanup(func() {
		if err := errors.Join(s.node.close(), loops(dir)); err != nil {
			t.Error(err)
		}
		check(t, s.ledger.log.Close())
	})
	t.Cleanup(func() { s.report(t) })
	began := time.Now()
	s.measureIdle(t.Context())
	for s.round = 1; !l.over(began, s.round) && !s.over() && t.Context().Err() == nil; s.round++ {
		s.oneRound(t.Context())
		if s.round%*every == 0 || s.over() {
			fmt.Printf("%s rebase=%v round %d after %v: pulls %d ok, %d cancelled, %d excused; %d at rest; %d pods; %v%d orphans at most; %s\n",
				fs, unpacks > 0, s.round, time.Since(began).Round(time.Second), s.pulls.Load(), s.cancelled.Load(), s.excused.Load(), s.final, s.pods.Load(), s.lastUsage(), s.orphaned, s.violations())
		}
	}
	if !s.over() {
		s.finish(t.Context())
	}
}

// report keeps the evidence when there were violations.
func (s *storm) report(t *testing.T) {
	text := s.violations()
	if text == "" {
		return
	}
	if *snapshotter != durable {
		t.Logf("the built-in snapshotter: %s", text)
		return
	}
	t.Errorf("seed %d, round %d: %s; evidence: %s", *seed, s.round, text, s.evidence())
}

// evidence copies everything out of the scratch directory, and returns where to.
func (s *storm) evidence() string {
	dir, err := os.MkdirTemp(*keep, fmt.Sprintf("storm-%d-", *seed))
	if err != nil {
		return err.Error()
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if s.node.Daemon != nil {
		out, _, verr := s.node.verb(ctx, "inspect", "--json")
		err = errors.Join(verr, os.WriteFile(filepath.Join(dir, "inspect.json"), []byte(out), 0o644))
	}
	files := append(s.node.logs(), s.ledger.log.Name(), filepath.Join(s.node.Containerd.Root, "io.containerd.metadata.v1.bolt/meta.db"))
	for _, file := range files {
		err = errors.Join(err, copyFile(filepath.Join(dir, filepath.Base(file)), file))
	}
	if err != nil {
		return fmt.Sprintf("%s, incomplete: %v", dir, err)
	}
	return dir
}

func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// random is a source for one lane of one round.
func (s *storm) random(lane int) *rand.Rand {
	return rand.New(rand.NewPCG(*seed, uint64(s.round)<<8|uint64(lane)))
}

// oneRound lets the actors act, and verifies what must be true when they have stopped.
func (s *storm) oneRound(ctx context.Context) {
	s.ledger.printf("round %d", s.round)
	until := time.Now().Add(blow)
	var all sync.WaitGroup
	for lane := range lanes {
		rng := s.random(lane)
		all.Go(func() {
			for len(s.lane) > 0 && time.Now().Before(until) && !s.over() {
				s.one(ctx, pick(s.lane, rng), fmt.Sprint("lane ", lane), rng)
			}
		})
	}
	// Without rounds in which nothing restarts, leaks could not be seen.
	if rng := s.random(lanes); len(s.power) > 0 && (s.round-1)/quiet%2 == 0 && rng.IntN(2) == 0 {
		all.Go(func() {
			time.Sleep(time.Duration(rng.IntN(int(blow))))
			s.one(ctx, pick(s.power, rng), "power", rng)
		})
	}
	all.Wait()
	if !s.over() {
		s.rest(ctx)
	}
}

func (s *storm) one(ctx context.Context, a actor, who string, rng *rand.Rand) {
	text, err := a.act(s, ctx, rng)
	s.ledger.printf("%s %s: %s", who, a.name, text)
	if err != nil {
		s.violate(a.name, "%s: %v", text, err)
	}
}
