package noharm

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// container runs the witness (tests/damage/witness) on the image.
type container struct {
	name string
	log  kit.WitnessLog // what it prints
}

// runArgs are those of ctr run for a witness that makes so many rounds.
func (n *node) runArgs(c *container, rounds string, flags ...string) []string {
	args := append([]string{"run"}, flags...)
	args = append(args, "--log-uri", "file://"+c.log.Path, "--snapshotter", "durable", n.image.Ref, c.name, "/bin/witness", rounds)
	return append(args, slices.Sorted(maps.Keys(watched))...)
}

func (n *node) newContainer(t testing.TB) *container {
	n.containers++
	return &container{name: fmt.Sprintf("c%d-%d", n.Number, n.containers), log: kit.WitnessLog{Path: filepath.Join(scratch(t), "log")}}
}

// use starts the container that runs through the events.
func (n *node) use(t testing.TB) {
	t.Helper()
	c := n.newContainer(t)
	n.ctr(t, n.runArgs(c, "0", "-d")...)
	n.witness = c
}

// unuse ends it.
func (n *node) unuse(t testing.TB) {
	t.Helper()
	if n.witness == nil {
		return
	}
	n.ctr(t, "task", "rm", "--force", n.witness.name)
	n.ctr(t, "container", "rm", n.witness.name)
	n.witness = nil
}

// startsAnew starts another container to its end.
func (n *node) startsAnew(t testing.TB) error {
	t.Helper()
	c := n.newContainer(t)
	if out, err := n.Ctr(t.Context(), n.runArgs(c, "1", "--rm")...); err != nil {
		return fmt.Errorf("a new container: %w: %s", err, out)
	}
	var err error
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		all, err2 := c.log.Observations()
		if err = err2; err == nil && len(all) == 1 {
			return right(all[0])
		}
	}
	return fmt.Errorf("a new container has printed nothing: %v", err)
}

// undisturbed waits for two more rounds, and is an error unless in each round so
// far everything was seen as it should be.
func (c *container) undisturbed() error {
	all, err := c.log.Observations()
	if err != nil {
		return err
	}
	until := len(all) + 2
	for deadline := time.Now().Add(time.Minute); len(all) < until; time.Sleep(50 * time.Millisecond) {
		if all, err = c.log.Observations(); err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("container %s has made %d observations, waiting for %d", c.name, len(all), until)
		}
	}
	for i, o := range all {
		if o.Round != i+1 {
			return fmt.Errorf("container %s: round %d, want %d: it was started again", c.name, o.Round, i+1)
		}
		if err := right(o); err != nil {
			return fmt.Errorf("container %s, round %d: %w", c.name, o.Round, err)
		}
	}
	return nil
}

func right(o kit.Observation) error {
	if !maps.Equal(o.Seen, watched) {
		return fmt.Errorf("saw %q, want %q", o.Seen, watched)
	}
	if o.Count != strconv.Itoa(o.Round) {
		return fmt.Errorf("counted %q in its own file, want %d", o.Count, o.Round)
	}
	for path, have := range o.Held {
		if have != watched[path] {
			return fmt.Errorf("the open file %s has %q, want %q", path, have, watched[path])
		}
	}
	return nil
}
