package storm

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// actor is one kind of action. It returns what it did, for the log, and an error
// only for what must not happen: most actions may fail in a storm.
type actor struct {
	name   string
	weight int // how often it is chosen among those of its lane
	act    func(s *storm, ctx context.Context, rng *rand.Rand) (string, error)
}

// laneActors are the actors that act side by side, several at a time.
var laneActors = []actor{
	{"pull", 30, (*storm).actPull},
	{"cancel", 24, (*storm).actCancel},
	{"die", 5, (*storm).actDie},
	{"remove", 12, (*storm).actRemove},
	{"collect", 6, (*storm).actCollect},
	{"prune", 2, (*storm).actPrune},
	{"lease", 2, (*storm).actLease},
	{"key", 2, (*storm).actKey},
	{"damage", 2, (*storm).actDamage},
	{"dirs", 1, (*storm).actDirs},
	{"noblob", 1, (*storm).actNoBlob},
	{"blob", 1, (*storm).actBlob},
	{"verbs", 3, (*storm).actVerbs},
	{"images", 3, (*storm).actImages},
	{"fetch", 2, (*storm).actFetch},
	{"registry", 2, (*storm).actRegistry},
	{"archive", 3, (*storm).actArchive},
	{"container", 12, (*storm).actContainer},
	{"neighbor", 3, (*storm).actNeighbor},
}

// powerActors act one at a time, at most once in a round.
var powerActors = []actor{
	{"kill", 6, (*storm).actKill},
	{"stop", 4, (*storm).actStop},
	{"killcd", 4, (*storm).actKillContainerd},
	{"stopcd", 2, (*storm).actStopContainerd},
	{"reset", 2, (*storm).actReset},
	{"cut", 4, (*storm).actCut},
}

// needDaemon are the actors that make no sense with the built-in snapshotter: it is
// part of containerd, and nothing mends its layers.
const needDaemon = " damage dirs noblob blob verbs images registry archive kill stop "

// chosen are those of all that -actors lets act.
func chosen(all []actor, list string) (some []actor, err error) {
	without, only := map[string]bool{}, map[string]bool{}
	for name := range strings.SplitSeq(list, ",") {
		if rest, ok := strings.CutPrefix(name, "-"); ok {
			without[rest] = true
		} else if name != "" {
			only[name] = true
		}
	}
	known := map[string]bool{}
	for _, a := range append(append([]actor(nil), laneActors...), powerActors...) {
		known[a.name] = true
	}
	for _, set := range []map[string]bool{without, only} {
		for name := range set {
			if !known[name] {
				return nil, fmt.Errorf("-actors: there is no %q", name)
			}
		}
	}
	for _, a := range all {
		if without[a.name] || len(only) > 0 && !only[a.name] {
			continue
		}
		if *snapshotter != durable && strings.Contains(needDaemon, " "+a.name+" ") {
			continue
		}
		some = append(some, a)
	}
	return some, nil
}

// pick chooses an actor by weight.
func pick(all []actor, rng *rand.Rand) actor {
	sum := 0
	for _, a := range all {
		sum += a.weight
	}
	at := rng.IntN(sum)
	for _, a := range all {
		if at -= a.weight; at < 0 {
			return a
		}
	}
	panic("unreachable")
}

// where chooses a namespace.
func where(rng *rand.Rand) string { return []string{plain, k8s}[rng.IntN(2)] }

// what chooses an image, and a way to pull it.
func (s *storm) what(rng *rand.Rand) (way kit.Way, namespace string, img stormImage) {
	namespace, img = where(rng), s.images[rng.IntN(len(s.images))]
	way = kit.Ways[rng.IntN(2)]
	if namespace == k8s && rng.IntN(3) == 0 {
		way = kit.ByCRI
	}
	return way, namespace, img
}

// try pulls, and fails the storm if the pull fails although nothing has disturbed
// it. Cancelled is a pull that the actor itself cuts short.
func (s *storm) try(ctx context.Context, way kit.Way, namespace string, img stormImage, cancelled bool) string {
	from := time.Now()
	// One that hangs is a violation, not the end of the storm.
	limited, cancel := context.WithTimeout(ctx, 3*time.Minute)
	err := s.node.pull(limited, way, namespace, img.Ref)
	cancel()
	took := time.Since(from).Round(time.Millisecond)
	text := fmt.Sprintf("%s %s %s in %v", way, namespace, img.name, took)
	if err == nil {
		s.pulls.Add(1)
		return text + ": ok"
	}
	text += ": " + strings.ReplaceAll(err.Error(), "\n", " ")
	excuse := s.ledger.excuse(namespace, img.Ref, from)
	switch {
	case excuse != "":
		s.excused.Add(1)
		time.Sleep(50 * time.Millisecond) // while no daemon serves, errors come at once
		return text + " (excused: " + excuse + ")"
	case cancelled && (ctx.Err() != nil || ended(err)):
		s.cancelled.Add(1)
		return text + " (cancelled)"
	case strings.Contains(err.Error(), "parent snapshot") && strings.Contains(err.Error(), "does not exist"):
		s.violate("parent", "%s", text)
	default:
		s.violate("pull", "%s", text)
	}
	return text
}

// ended reports an error of a context that has ended. The server may see that before
// the client does.
func ended(err error) bool {
	code := status.Code(err)
	return code == codes.DeadlineExceeded || code == codes.Canceled || strings.Contains(err.Error(), context.DeadlineExceeded.Error()) || strings.Contains(err.Error(), context.Canceled.Error())
}

func (s *storm) actPull(ctx context.Context, rng *rand.Rand) (string, error) {
	way, namespace, img := s.what(rng)
	return s.try(ctx, way, namespace, img, false), nil
}

func (s *storm) actCancel(ctx context.Context, rng *rand.Rand) (string, error) {
	way, namespace, img := s.what(rng)
	again, _, _ := s.what(rng)
	if again == kit.ByCRI && namespace != k8s {
		again = kit.ByTransfer
	}
	short, cancel := context.WithTimeout(ctx, time.Duration(rng.IntN(400))*time.Millisecond)
	defer cancel()
	first := s.try(short, way, namespace, img, true)
	return first + "; again: " + s.try(ctx, again, namespace, img, false), nil
}

// actDie has ctr pull, and kills it with SIGKILL.
func (s *storm) actDie(ctx context.Context, rng *rand.Rand) (string, error) {
	_, namespace, img := s.what(rng)
	args := []string{"--namespace", namespace, "image", "pull", "--plain-http", "--snapshotter", *snapshotter}
	if rng.IntN(2) == 0 {
		args = append(args, "--local")
	}
	short, cancel := context.WithTimeout(ctx, time.Duration(50+rng.IntN(500))*time.Millisecond)
	defer cancel()
	_, err := s.node.Containerd.Ctr(short, append(args, img.Ref)...)
	return fmt.Sprintf("%q ended with an error: %v", append(args[2:], img.name), err != nil), nil
}

func (s *storm) actRemove(ctx context.Context, rng *rand.Rand) (string, error) {
	namespace, img := where(rng), s.images[rng.IntN(len(s.images))]
	defer s.ledger.disturb("removal", namespace, img.Ref)()
	var opts []images.DeleteOpt
	if rng.IntN(2) == 0 {
		opts = append(opts, images.SynchronousDelete())
	}
	err := s.node.client().ImageService().Delete(namespaces.WithNamespace(ctx, namespace), img.Ref, opts...)
	return fmt.Sprintf("%s %s, waits %v: %v", namespace, img.name, len(opts) > 0, err), nil
}

func (s *storm) actCollect(ctx context.Context, rng *rand.Rand) (string, error) {
	return fmt.Sprint(s.collect(ctx, where(rng))), nil
}

// collect has the garbage collected, and waits: deleting a lease is how ctr requests it.
func (s *storm) collect(ctx context.Context, namespace string) error {
	ctx = namespaces.WithNamespace(ctx, namespace)
	l, err := s.node.client().LeasesService().Create(ctx, leases.WithRandomID())
	if err == nil {
		err = s.node.client().LeasesService().Delete(ctx, l, leases.SynchronousDelete)
	}
	return err
}

func (s *storm) actPrune(ctx context.Context, rng *rand.Rand) (string, error) {
	namespace := where(rng)
	defer s.ledger.disturb("prune", namespace)()
	args := [][]string{{"images", "prune", "--all"}, {"content", "prune", "references"}}[rng.IntN(2)]
	_, err := s.node.Containerd.Ctr(ctx, append([]string{"--namespace", namespace}, args...)...)
	return fmt.Sprintf("%s %q: %v", namespace, args, err), nil
}

func (s *storm) actLease(ctx context.Context, rng *rand.Rand) (string, error) {
	namespace := where(rng)
	in := namespaces.WithNamespace(ctx, namespace)
	all, err := s.node.client().LeasesService().List(in)
	if err != nil || len(all) == 0 {
		return fmt.Sprintf("%s: none: %v", namespace, err), nil
	}
	l := all[rng.IntN(len(all))]
	defer s.ledger.disturb("lease deleted", namespace)()
	return fmt.Sprintf("%s %s: %v", namespace, l.ID, s.node.client().LeasesService().Delete(in, l)), nil
}

func (s *storm) actKey(ctx context.Context, rng *rand.Rand) (string, error) {
	namespace := where(rng)
	in := namespaces.WithNamespace(ctx, namespace)
	keys, err := s.keys(ctx, namespace)
	if err != nil || len(keys) == 0 {
		return fmt.Sprintf("%s: none: %v", namespace, err), nil
	}
	key := keys[rng.IntN(len(keys))]
	chain := key[strings.LastIndex(key, " ")+1:]
	refs := with(s.images, chain)
	defer s.ledger.disturb("key deleted", namespace, refs...)()
	if err = s.node.snapshotter().Remove(in, key); err == nil {
		// A pull that was at work may have seen the layer. Without its blob, as after a prune, the
		// container that comes next cannot be made.
		s.ledger.lack("key deleted", namespace, refs...)
	}
	return fmt.Sprintf("%s %s: %v", namespace, key, err), nil
}

// keys lists the snapshots that containerd has in a namespace.
func (s *storm) keys(ctx context.Context, namespace string) (keys []string, err error) {
	err = s.node.snapshotter().Walk(namespaces.WithNamespace(ctx, namespace), func(_ context.Context, i snapshots.Info) error {
		keys = append(keys, i.Name)
		return nil
	})
	return keys, err
}

// actVerbs runs a verb, as an operator or a monitoring system does.
func (s *storm) actVerbs(ctx context.Context, rng *rand.Rand) (string, error) {
	return s.runVerb(ctx, rng, verbs)
}

var verbs = [][]string{{"check"}, {"check", "--deep"}, {"inspect"}, {"repair"}, {"repair", "--apply"}, {"repair", "--deep", "--apply"}}

// ofImages are the verbs that are about images.
var ofImages = [][]string{{"check", "--images"}, {"repair", "--images"}, {"repair", "--images", "--apply"}, {"repair", "--images", "--apply"}, {"repair", "--images", "--deep", "--apply"}}

func (s *storm) actImages(ctx context.Context, rng *rand.Rand) (string, error) {
	return s.runVerb(ctx, rng, ofImages)
}

func (s *storm) runVerb(ctx context.Context, rng *rand.Rand, verbs [][]string) (string, error) {
	args := verbs[rng.IntN(len(verbs))]
	s.node.onDisk.RLock()
	defer s.node.onDisk.RUnlock()
	out, code, err := s.node.verb(ctx, args...)
	return fmt.Sprintf("%q: exit %d, %v: %s", args, code, err, strings.ReplaceAll(done(args, out), "\n", " | ")), nil
}

// done is what a verb that has repaired images has printed.
func done(args []string, out string) string {
	if len(args) > 2 && args[1] == "--images" {
		return out
	}
	return ""
}

// disturbAll runs what takes containerd or the daemon away, and brings it back.
func (s *storm) disturbAll(ctx context.Context, what string, do func() error) error {
	end := s.ledger.disturb(what, "")
	defer end()
	if err := do(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if err := s.node.reached(ctx); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// meanwhile sometimes runs a verb while the daemon is down, and while it starts.
func (s *storm) meanwhile(ctx context.Context, rng *rand.Rand) (wait func() string) {
	if !s.has("verbs") || rng.IntN(3) > 0 {
		return func() string { return "" }
	}
	done := make(chan string, 1)
	go func() {
		text, _ := s.runVerb(ctx, rng, append(verbs, ofImages...))
		done <- ", meanwhile " + text
	}()
	// The verb shall have the database open when the daemon wants it, sometimes.
	time.Sleep(time.Duration(rng.IntN(60)) * time.Millisecond)
	return func() string { return <-done }
}

func (s *storm) down(ctx context.Context, rng *rand.Rand, what string, stop func() error) (text string, err error) {
	pause := time.Duration(rng.IntN(300)) * time.Millisecond
	err = s.disturbAll(ctx, what, func() error {
		if err := stop(); err != nil {
			return err
		}
		wait := s.meanwhile(ctx, rng)
		time.Sleep(pause)
		err := s.node.start(ctx)
		text = wait()
		return err
	})
	return fmt.Sprintf("for %v%s", pause, text), err
}

func (s *storm) actKill(ctx context.Context, rng *rand.Rand) (string, error) {
	return s.down(ctx, rng, "daemon killed", s.node.kill)
}

func (s *storm) actStop(ctx context.Context, rng *rand.Rand) (string, error) {
	return s.down(ctx, rng, "daemon stopped", s.node.Daemon.Stop)
}

func (s *storm) actKillContainerd(ctx context.Context, rng *rand.Rand) (string, error) {
	return "", s.disturbAll(ctx, "containerd killed", func() error {
		if err := s.node.Containerd.Kill(); err != nil {
			return err
		}
		return s.node.startContainerd(ctx)
	})
}

func (s *storm) actStopContainerd(ctx context.Context, rng *rand.Rand) (string, error) {
	return "", s.disturbAll(ctx, "containerd stopped", func() error {
		if err := s.node.Containerd.Stop(); err != nil {
			return err
		}
		return s.node.startContainerd(ctx)
	})
}

func (s *storm) actReset(ctx context.Context, rng *rand.Rand) (string, error) {
	lost := []string{".", "io.containerd.metadata.v1.bolt/meta.db"}[rng.IntN(2)]
	return lost, s.disturbAll(ctx, "containerd's root deleted: "+lost, func() error {
		if err := s.node.Containerd.Kill(); err != nil {
			return err
		}
		// What it has no record of any more it could not stop, and its layers would stay in use.
		if err := s.node.endContainers(); err != nil {
			return err
		}
		s.node.onDisk.RLock()
		err := os.RemoveAll(filepath.Join(s.node.Containerd.Root, lost))
		s.node.onDisk.RUnlock()
		if err != nil {
			return err
		}
		return s.node.startContainerd(ctx)
	})
}

func (s *storm) actCut(ctx context.Context, rng *rand.Rand) (string, error) {
	return "", s.disturbAll(ctx, "power cut", func() error { return s.node.cut(ctx) })
}
