package damage

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestScrub: a daemon that is configured to scrub finds and heals by itself what
// no call has needed.
func TestScrub(t *testing.T) {
	t.Parallel()
	n := newNodeWith(t, "ext4", must[kit.Pushed](t)(image()), "[scrub]\ninterval = '500ms'\ndepth = 'content'\n")
	n.learn(t)
	n.container = n.run(t, "lasting")
	mark := n.container.mark(t)
	for _, depth := range []string{"content", "metadata"} {
		t.Run(depth, func(t *testing.T) {
			n.digested(t)
			// Not while a layer is healed, and other directories take the place of
			// those that are being damaged.
			n.quietly(t, func() (err error) {
				for layer, d := range damages() {
					if d.deep == (depth == "content") {
						err = errors.Join(err, d.inflict(n.root(layer), d.dir(layer)))
					}
				}
				return err
			})
			waitFor(t, time.Minute, func() error {
				for _, layer := range layerNames {
					tree, err := n.tryTree(layer)
					if err != nil {
						return err
					}
					if diff := kit.Diff(n.trees[layer], tree, 1); diff != "" {
						return fmt.Errorf("layer %s is not healed:\n%s", layer, diff)
					}
				}
				return nil
			})
			n.settled(t)
			n.clean(t, "--deep")
		})
	}
	n.startsAnew(t)
	n.container.undisturbed(t, mark)
}

// settled waits until the daemon has verified its layers in a whole round and
// found nothing.
func (n *node) settled(t *testing.T) {
	t.Helper()
	now := time.Now()
	waitFor(t, time.Minute, func() error {
		s := kittest.Inspect(t, n.Daemon).Journal.Scrub
		if s.Started.Before(now) || s.Finished.IsZero() || s.Damaged > 0 {
			return fmt.Errorf("no round without findings since %v: %+v", now, s)
		}
		return nil
	})
	n.clean(t, "--cached")
}

// scrubbedLayers are as many as a round can be cut short in.
const scrubbedLayers = 8

// TestScrubResumed kills the daemon in the middle of a round. The next one goes
// on where it was, and verifies no layer twice.
func TestScrubResumed(t *testing.T) {
	t.Parallel()
	var layers []kit.Layer
	for i := range scrubbedLayers {
		// A quarter of a second each at the rate below: what is read at once is
		// paid for by what comes after it.
		var content strings.Builder
		for j := 0; content.Len() < 2<<20; j++ {
			fmt.Fprintf(&content, "%x", sha256.Sum256(fmt.Appendf(nil, "%d %d", i, j)))
		}
		layers = append(layers, kit.NewLayer(kit.Plain, kit.File(fmt.Sprintf("layer%d", i), 0o644, content.String())))
	}
	img := must[kit.Pushed](t)(kit.Push(t.Context(), registry, "scrubbed", kit.Image{Layers: layers}))
	n := newNodeWith(t, "ext4", img, fmt.Sprintf("[scrub]\ninterval = '1s'\ndepth = 'content'\nrate = %d\n", 4<<20))

	cut := n.killInRound(t)
	check(t, n.Daemon.Start(t.Context()))
	rounds := n.waitForRound(t, cut.Started)
	if rounds.Looked != scrubbedLayers || rounds.Damaged != 0 || rounds.Next <= cut.Next {
		t.Errorf("a round that was cut short at %+v ended as %+v, want %d verifications in all", cut, rounds, scrubbedLayers)
	}
	resumed := n.logged(t, "scrub: round begins", func(l logLine) bool { return l.From == cut.Next })
	if resumed.Layers != scrubbedLayers-cut.Looked {
		t.Errorf("the daemon went on at layer %d with %d layers, after a round of %d was cut short at %+v", cut.Next, resumed.Layers, scrubbedLayers, cut)
	}
}

// killInRound kills the daemon when it has verified some layers but not all.
func (n *node) killInRound(t *testing.T) kit.ScrubRound {
	t.Helper()
	pulled := time.Now()
	within := func(s kit.ScrubRound) bool {
		return s.Started.After(pulled) && s.Finished.IsZero() && s.Looked > 0 && s.Looked < scrubbedLayers
	}
	for range 5 {
		waitFor(t, time.Minute, func() error {
			if s := kittest.Inspect(t, n.Daemon).Journal.Scrub; !within(s) {
				return fmt.Errorf("not in the middle of a round: %+v", s)
			}
			return nil
		})
		check(t, n.Daemon.Kill())
		if s := kittest.Inspect(t, n.Daemon).Journal.Scrub; within(s) {
			return s
		}
		check(t, n.Daemon.Start(t.Context())) // the round was over meanwhile
	}
	t.Fatal("the daemon could not be killed in the middle of a round")
	return kit.ScrubRound{}
}

// waitForRound returns the journal's last word on the round that began then.
func (n *node) waitForRound(t *testing.T, started time.Time) (round kit.ScrubRound) {
	t.Helper()
	waitFor(t, time.Minute, func() error {
		switch s := kittest.Inspect(t, n.Daemon).Journal.Scrub; {
		case s.Started.Equal(started):
			round = s
			if s.Finished.IsZero() {
				return fmt.Errorf("the round is not over: %+v", s)
			}
			return nil
		default:
			return fmt.Errorf("the round that began %v was not gone on with: %+v", started, s)
		}
	})
	return round
}

// logLine is what the daemon's log has of scrubbing.
type logLine struct {
	Msg    string
	From   uint64
	Layers int
}

func (n *node) logged(t *testing.T, msg string, ok func(logLine) bool) logLine {
	t.Helper()
	for line := range strings.Lines(string(must[[]byte](t)(os.ReadFile(n.Daemon.LogPath())))) {
		var l logLine
		if json.Unmarshal([]byte(line), &l) == nil && l.Msg == msg && ok(l) {
			return l
		}
	}
	t.Fatalf("the daemon's log has no %q that fits", msg)
	return logLine{}
}
