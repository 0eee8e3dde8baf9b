package full

import (
	"fmt"
	"sync"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
)

// Tally counts results, and apart from them what is containerd's own.
type Tally struct {
	lab.Tally
	Counts

	mu    sync.Mutex // guards Counts and Notes
	Notes []Note
}

// Counts of the calls of containerd, and of what went wrong there and is
// not the snapshotter's fault.
type Counts struct {
	Booted  int // states on which containerd started
	Equal   int // images that containerd calls unpacked, and that equal their references
	Created int // containers of images that the CRI plugin lists, whose trees equal the references
	Pulled  int // pulls after the crash that succeeded
	Swept   int // states on which garbage collection left nothing at the end

	NotBooted int // states on which containerd did not start
	Unread    int // images listed whose manifest or config cannot be read
	Unlisted  int // images whose pull was answered, and that are not listed
	Damaged   int // pulls that ended because of a damaged blob in the content store
	Orphaned  int // pulls that ended in "parent snapshot does not exist": flaws, too
}

// Note is one of the things that are not the snapshotter's fault.
type Note struct {
	ID     string // of the state
	Reason string
}

func (n Note) String() string { return n.ID + ": " + n.Reason }

func (c Counts) String() string {
	return fmt.Sprintf("%d boots, %d images equal, %d containers equal, %d pulls, %d sweeps; of containerd: %d not booted, %d images not readable, %d not listed, %d pulls with a damaged blob; %d pulls without a parent",
		c.Booted, c.Equal, c.Created, c.Pulled, c.Swept, c.NotBooted, c.Unread, c.Unlisted, c.Damaged, c.Orphaned)
}

// keepNotes bounds what a Tally remembers.
const keepNotes = 50

// count takes in the result of one state.
func (t *Tally) count(r lab.Result, c Counts, notes []string) {
	t.Tally.Count(r, 0) // pulls are counted below, layers are not
	t.mu.Lock()
	defer t.mu.Unlock()
	t.Counts.add(c)
	for _, reason := range notes {
		if len(t.Notes) < keepNotes {
			t.Notes = append(t.Notes, Note{r.ID, reason})
		}
	}
}

// Merge adds another tally, of other states.
func (t *Tally) Merge(o *Tally) {
	t.Tally.Add(&o.Tally)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.Counts.add(o.Counts)
	t.Notes = append(t.Notes, o.Notes[:min(len(o.Notes), keepNotes-min(keepNotes, len(t.Notes)))]...)
}

func (c *Counts) add(o Counts) {
	c.Booted += o.Booted
	c.Equal += o.Equal
	c.Created += o.Created
	c.Pulled += o.Pulled
	c.Swept += o.Swept
	c.NotBooted += o.NotBooted
	c.Unread += o.Unread
	c.Unlisted += o.Unlisted
	c.Damaged += o.Damaged
	c.Orphaned += o.Orphaned
}
