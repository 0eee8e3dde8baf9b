package damage

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// container runs the program witness on the image; see there.
type container struct {
	node *node
	name string
	pid  string
	log  *kit.WitnessLog // what it prints
}

func newLog(t *testing.T) *kit.WitnessLog {
	return &kit.WitnessLog{Path: filepath.Join(scratch(t), "log")}
}

func witnessArgs(rounds string) []string {
	return append([]string{"/bin/witness", rounds}, slices.Sorted(maps.Keys(watched))...)
}

// run starts a container that observes until it is stopped, after the test.
func (n *node) run(t *testing.T, name string) *container {
	t.Helper()
	name = fmt.Sprintf("%s-%d", name, n.Number)
	c := &container{node: n, name: name, log: newLog(t)}
	n.ctr(t, append([]string{"run", "-d", "--log-uri", "file://" + c.log.Path, "--snapshotter", "durable", n.image.Ref, name}, witnessArgs("0")...)...)
	t.Cleanup(func() { c.remove(t) })
	var err error
	if c.pid, err = c.running(t); err != nil {
		t.Fatal(err)
	}
	c.undisturbed(t, c.mark(t))
	return c
}

// restart ends the process of the container and starts another, in the same root
// file system, which is mounted anew.
func (c *container) restart(t *testing.T) {
	t.Helper()
	c.node.ctr(t, "task", "rm", "--force", c.name)
	c.log = newLog(t)
	c.node.ctr(t, "task", "start", "-d", "--log-uri", "file://"+c.log.Path, c.name)
	c.pid = must[string](t)(c.running(t))
	c.undisturbed(t, 0)
}

// remove ends the container, whatever has happened to its layers.
func (c *container) remove(t *testing.T) {
	t.Helper()
	ctx := context.Background() // the test's own has ended
	if _, err := c.node.Ctr(ctx, "task", "rm", "--force", c.name); err != nil {
		t.Error(err)
	}
	if _, err := c.node.Ctr(ctx, "container", "rm", c.name); err != nil {
		t.Error(err)
	}
}

// running returns the process of the container.
func (c *container) running(t *testing.T) (pid string, err error) {
	t.Helper()
	for line := range strings.Lines(c.node.ctr(t, "task", "ls")) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == c.name {
			if f[2] != "RUNNING" {
				return "", fmt.Errorf("container %s is %s", c.name, f[2])
			}
			return f[1], nil
		}
	}
	return "", fmt.Errorf("container %s is not in the list of tasks", c.name)
}

// observations returns all the witness has printed, in order.
func (c *container) observations(t *testing.T) []kit.Observation {
	t.Helper()
	return must[[]kit.Observation](t)(c.log.Observations())
}

// mark is the number of the last observation so far.
func (c *container) mark(t *testing.T) int {
	t.Helper()
	return len(c.observations(t))
}

// alive fails unless the container is the same process as ever, and counts on
// and reads its open files as it always did since the mark.
func (c *container) alive(t *testing.T, mark int) { c.went(t, mark, heldOnly) }

// undisturbed fails unless in addition everything that it sees and writes is as
// it should be, in each single observation since the mark.
func (c *container) undisturbed(t *testing.T, mark int) { c.went(t, mark, all) }

func (c *container) went(t *testing.T, mark int, right func(kit.Observation) error) {
	t.Helper()
	// Three more rounds: it must be alive now, not only have been.
	until := c.mark(t) + 3
	waitFor(t, 20*time.Second, func() error {
		if n := c.mark(t); n < until {
			return fmt.Errorf("container %s has made %d observations, waiting for %d", c.name, n, until)
		}
		return nil
	})
	if pid, err := c.running(t); err != nil {
		t.Error(err)
	} else if c.pid != "" && pid != c.pid {
		t.Errorf("container %s is process %s, was %s", c.name, pid, c.pid)
	}
	for i, o := range c.observations(t)[mark:] {
		if o.Round != mark+i+1 {
			t.Errorf("container %s: round %d, want %d", c.name, o.Round, mark+i+1)
		}
		if err := right(o); err != nil {
			t.Fatalf("container %s, round %d: %v", c.name, o.Round, err)
		}
	}
}

func heldOnly(o kit.Observation) error {
	for path, want := range watched {
		have, ok := o.Held[path]
		if ok && have != want || !ok && strings.HasSuffix(path, "/held") {
			return fmt.Errorf("the open file %s has %q, want %q", path, have, want)
		}
	}
	return nil
}

func all(o kit.Observation) error {
	if !maps.Equal(o.Seen, watched) {
		return fmt.Errorf("saw %q, want %q", o.Seen, watched)
	}
	if o.Count != strconv.Itoa(o.Round) {
		return fmt.Errorf("counted %q in its own file, want %d", o.Count, o.Round)
	}
	return heldOnly(o)
}

// startsAnew starts another container, which must see what it should, and end.
func (n *node) startsAnew(t *testing.T) {
	t.Helper()
	check(t, n.tryStart(t))
}

// tryStart has the container print into a file: what ctr passes on of its output
// is sometimes nothing, when the container ends at once.
func (n *node) tryStart(t *testing.T) error {
	t.Helper()
	c := &container{name: fmt.Sprintf("new-%d", n.Number), log: newLog(t)}
	args := append([]string{"run", "--rm", "--log-uri", "file://" + c.log.Path, "--snapshotter", "durable", n.image.Ref, c.name}, witnessArgs("1")...)
	_, err := n.Ctr(t.Context(), args...)
	// Prepare waits a second for a layer that heals, so as not to keep containerd's lock.
	for deadline := time.Now().Add(time.Minute); err != nil && strings.Contains(err.Error(), "try again") && time.Now().Before(deadline); {
		_, err = n.Ctr(t.Context(), args...)
	}
	if err != nil {
		printed, _ := os.ReadFile(c.log.Path) // there may be none
		return fmt.Errorf("%w\n%s", err, printed)
	}
	waitFor(t, 20*time.Second, func() error {
		if c.mark(t) != 1 {
			return fmt.Errorf("%s has printed %d observations, want 1", c.name, c.mark(t))
		}
		return nil
	})
	if err := all(c.observations(t)[0]); err != nil {
		return fmt.Errorf("the new container: %w", err)
	}
	return nil
}
