package storm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
)

type image = images.Image

// usage is what the daemon needs of the machine, at rest.
type usage struct {
	round, pid           int
	fds, threads, rssKiB int
	active               int      // snapshots of pods that run, each of which has a descriptor
	open                 []string // what the descriptors are, when they are too many
	database             int64    // bytes of metadata.db
	unleased             bool     // no lease of a dead client keeps anything
}

func (u usage) String() string {
	return fmt.Sprintf("pid %d: %d descriptors, %d threads, %d MiB, metadata.db %d KiB; ", u.pid, u.fds, u.threads, u.rssKiB>>10, u.database>>10)
}

func (s *storm) lastUsage() string {
	if len(s.usage) == 0 {
		return ""
	}
	return s.usage[len(s.usage)-1].String()
}

var statusLine = regexp.MustCompile(`(?m)^(Threads|VmRSS):\s+(\d+)`)

// closesWithin is how long a daemon at rest may keep descriptors that it does not need any
// more: those of a verb that has just ended, or of the digests of a new layer. What it never
// closes is a leak.
const closesWithin = 20 * time.Second

// measure notes what the daemon uses, once its descriptors are not more than it may have, or
// have stayed.
func (s *storm) measure(ctx context.Context) {
	u := usage{round: s.round, pid: s.node.Daemon.PID(), unleased: s.round%unload == 0}
	found, err := s.node.Daemon.Inspect(ctx)
	if err != nil {
		s.violate("storm", "the storm itself: %v", err)
		return
	}
	for _, r := range found.Snapshots {
		if r.Kind == "active" {
			u.active++
		}
	}
	dir := filepath.Join("/proc", strconv.Itoa(u.pid))
	fds, err := os.ReadDir(filepath.Join(dir, "fd"))
	for until := time.Now().Add(closesWithin); err == nil && u.unleased && len(s.usage) > 0 && len(fds) > u.active+s.usage[0].fds+moreFDs && time.Now().Before(until); {
		time.Sleep(100 * time.Millisecond)
		fds, err = os.ReadDir(filepath.Join(dir, "fd"))
	}
	text, serr := os.ReadFile(filepath.Join(dir, "status"))
	db, derr := os.Stat(filepath.Join(s.node.Daemon.Root, "metadata.db"))
	if err := errors.Join(err, serr, derr); err != nil {
		s.violate("storm", "the storm itself: %v", err)
		return
	}
	u.fds, u.database = len(fds), db.Size()
	if len(s.usage) > 0 && u.fds > u.active+s.usage[0].fds+moreFDs {
		for _, fd := range fds {
			link, _ := os.Readlink(filepath.Join(dir, "fd", fd.Name()))
			u.open = append(u.open, link)
		}
	}
	for _, m := range statusLine.FindAllStringSubmatch(string(text), -1) {
		n, _ := strconv.Atoi(m[2])
		if m[1] == "Threads" {
			u.threads = n
		} else {
			u.rssKiB = n
		}
	}
	s.usage = append(s.usage, u)
}

// What the daemon may use more after ten and more rounds of the same process. Go's
// heap grows with the largest request so far, threads with the system calls that
// were slow at the same time.
const (
	moreFDs        = 8
	moreThreads    = 24
	moreRSS        = 48 << 10
	moreGoroutines = 12
)

// maxDatabase is what metadata.db may have, in bytes, however long the storm. The journal keeps
// 1,000 removed snapshots, below a kilobyte each; bbolt uses free pages again, and never gives
// them back.
const maxDatabase = 4 << 20

// leaks compares measurements without leases of dead clients: descriptors with those
// of a daemon that has done nothing, the rest with the first of the same process.
func (s *storm) leaks() {
	first := map[int]usage{}
	for _, u := range s.usage[1:] {
		f, known := first[u.pid]
		switch {
		case !u.unleased:
		case u.fds > u.active+s.usage[0].fds+moreFDs:
			s.violate("leak", "a daemon that has done nothing had %v after round %d there were %v%q", s.usage[0], u.round, u, u.open)
		case u.database > maxDatabase:
			s.violate("leak", "after round %d: %v", u.round, u)
		case !known:
			first[u.pid] = u
		case u.threads > f.threads+moreThreads || u.rssKiB > f.rssKiB+moreRSS:
			s.violate("leak", "the daemon needed %v after round %d, and %v after round %d", f, f.round, u, u.round)
		}
	}
}

// goroutines ends the daemon with SIGQUIT, which makes it print all of them, and
// counts them.
func (s *storm) goroutines(ctx context.Context) (int, error) {
	before, err := s.node.Daemon.Log()
	if err == nil {
		err = syscall.Kill(s.node.Daemon.PID(), syscall.SIGQUIT)
	}
	if err == nil {
		_, err = s.node.Daemon.Wait(time.Minute)
	}
	if err != nil {
		return 0, err
	}
	log, err := s.node.Daemon.Log()
	n := strings.Count(log[len(before):], "\ngoroutine ")
	if n == 0 {
		err = errors.Join(err, errors.New("SIGQUIT has printed no goroutines"))
	}
	return n, errors.Join(err, s.node.start(ctx), s.node.reached(ctx))
}

// measureIdle counts the goroutines of a daemon that has done nothing yet.
func (s *storm) measureIdle(ctx context.Context) {
	if s.node.Daemon == nil {
		return
	}
	var err error
	if s.idle, err = s.goroutines(ctx); err != nil {
		s.violate("start", "%v", err)
	}
	s.measure(ctx)
}

// events are those of the daemon's log that show how much of its work the storm has met.
var events = []string{"layer_healed", "blob_fetched", "fetch_failed", "blob_put_back", "layer_dropped", "images_checked"}

// met counts the events of the daemon.
func (s *storm) met() string {
	log, err := s.node.Daemon.Log()
	if err != nil {
		return err.Error()
	}
	var all []string
	for _, e := range events {
		all = append(all, fmt.Sprintf("%s %d", e, strings.Count(log, `"event":"`+e+`"`)))
	}
	return strings.Join(all, ", ")
}

// finish removes everything, and verifies that nothing is left.
func (s *storm) finish(ctx context.Context) {
	s.ledger.printf("finish")
	if s.node.Daemon == nil {
		return
	}
	fmt.Printf("%s: events of the daemon: %s\n", s.node.fs, s.met())
	s.leaks()
	if n, err := s.goroutines(ctx); err != nil || n > s.idle+moreGoroutines {
		s.violate("leak", "%d goroutines at the end, %d at the beginning: %v", n, s.idle, err)
	}
	if err := s.endPods(ctx); err != nil {
		s.violate("remove", "%v", err)
	}
	for _, namespace := range []string{plain, k8s} {
		if err := s.removeAll(ctx, namespace); err != nil {
			s.violate("remove", "%s: %v", namespace, err)
		}
	}
	in := namespaces.WithNamespace(ctx, standing)
	if err := s.node.snapshotter().Remove(in, s.node.standingKey()); err != nil {
		s.violate("remove", "%s: %v", standing, err)
	}
	var left string
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(200 * time.Millisecond) {
		if err := s.collect(ctx, plain); err != nil {
			s.violate("remove", "collect: %v", err)
		}
		if left = s.left(ctx); left == "" {
			s.measure(ctx)
			fmt.Printf("%s: after %d rounds nothing is left; a daemon that had done nothing: %v and %d goroutines; this one: %v\n", s.node.fs, s.round-1, s.usage[0], s.idle, s.lastUsage())
			return
		}
		if time.Now().After(deadline) {
			s.violate("left", "after everything was removed and collected: %s", left)
			return
		}
	}
}

// loops returns an error for loop devices that still have a file of a directory.
func loops(dir string) (err error) {
	files, gerr := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, name := range files {
		file, rerr := os.ReadFile(name)
		if rerr == nil && strings.HasPrefix(string(file), dir+"/") {
			err = errors.Join(err, fmt.Errorf("%s is left: %s", name, file))
		}
	}
	return errors.Join(err, gerr)
}

// removeAll removes the images and the leases of a namespace. First the images: what
// a lease of ours keeps then is used by no image.
func (s *storm) removeAll(ctx context.Context, namespace string) error {
	in := namespaces.WithNamespace(ctx, namespace)
	listed, err := s.node.client().ImageService().List(in)
	for _, img := range listed {
		err = errors.Join(err, s.node.client().ImageService().Delete(in, img.Name, images.SynchronousDelete()))
	}
	all, lerr := s.node.client().LeasesService().List(in)
	for _, l := range all {
		if strings.HasPrefix(l.ID, repull.LeasePrefix) {
			s.violate("lease", "a lease of the daemon's is left in %s: %v", namespace, l)
		}
	}
	if err := errors.Join(err, lerr); err != nil {
		return err
	}
	s.unlease(ctx)
	return nil
}

// left describes what is left of everything, "" when that is nothing.
func (s *storm) left(ctx context.Context) string {
	var all []string
	dirs, err := s.node.directories()
	if err != nil {
		return err.Error()
	}
	found, err := s.node.Daemon.Inspect(ctx)
	if err != nil {
		return err.Error()
	}
	all = append(all, dirs...)
	for _, r := range found.Snapshots {
		all = append(all, "row "+r.Name)
	}
	for _, e := range found.Journal.Open {
		all = append(all, "journal "+e.Key)
	}
	for _, e := range found.Journal.Committed {
		all = append(all, "journal "+e.Name)
	}
	for _, namespace := range []string{plain, k8s, standing} {
		keys, err := s.keys(ctx, namespace)
		if err != nil {
			return err.Error()
		}
		for _, key := range keys {
			all = append(all, "containerd's "+namespace+" "+key)
		}
	}
	return strings.Join(all, "\n")
}
