package disk

import (
	"fmt"
	"strings"
	"syscall"
	"time"
)

// Fault is a defect of the disk: which requests it concerns, which of these it
// hits, and what happens to them.
type Fault struct {
	// Op is the kind of request: OpWrite, OpFlush, OpDiscard, OpRead, or
	// several of them added up.
	Op Op `json:"op"`
	// Ranges limits writes, discards and reads to those that touch one of
	// them. Empty means all. A flush has no place, and ignores it.
	Ranges []Range `json:"ranges,omitempty"`
	// Skip is the number of matching requests that pass before the first hit:
	// the k of "the k-th write".
	Skip int `json:"skip,omitempty"`
	// Every hits only each such request of those, the first among them. Zero means all.
	Every int `json:"every,omitempty"`
	// Times is the number of hits. Zero means for ever.
	Times int `json:"times,omitempty"`

	// Stall delays the request before anything else happens to it.
	Stall time.Duration `json:"stall,omitempty"`
	// Errno is the answer. Zero means that the request is done and succeeds.
	Errno syscall.Errno `json:"errno,omitempty"`
	// Short lets the first Short bytes of a failing write, a multiple of 512,
	// reach the disk. It needs an Errno: a short count without an error is
	// taken for success by the loop driver (lo_complete_rq of Linux 6.18), so
	// it would make a disk that lies, and against that no snapshotter can promise
	// anything.
	Short int64 `json:"short,omitempty"`
}

// Op is a set of request kinds.
type Op uint8

// The request kinds a Fault can concern.
const (
	OpWrite Op = 1 << iota
	OpFlush
	OpDiscard
	OpRead
)

func (o Op) String() string {
	var names []string
	for i, name := range []string{"write", "flush", "discard", "read"} {
		if o&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return "nothing"
	}
	return strings.Join(names, "|")
}

func (f Fault) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s", f.Op)
	if len(f.Ranges) > 0 {
		fmt.Fprintf(&b, " in %d ranges", len(f.Ranges))
	}
	fmt.Fprintf(&b, " after %d", f.Skip)
	if f.Every > 0 {
		fmt.Fprintf(&b, ", each %d", f.Every)
	}
	if f.Times > 0 {
		fmt.Fprintf(&b, ", %d times", f.Times)
	}
	if f.Stall > 0 {
		fmt.Fprintf(&b, ", stall %s", f.Stall)
	}
	if f.Short > 0 {
		fmt.Fprintf(&b, ", short %d", f.Short)
	}
	if f.Errno != 0 {
		fmt.Fprintf(&b, ", %s", f.Errno)
	}
	return b.String()
}

func (f Fault) valid() error {
	switch {
	case f.Op == 0:
		return fmt.Errorf("fault %q: no kind of request", f)
	case f.Skip < 0 || f.Every < 0 || f.Times < 0 || f.Short < 0 || f.Stall < 0:
		return fmt.Errorf("fault %q: a negative number", f)
	case f.Errno == 0 && f.Stall == 0:
		return fmt.Errorf("fault %q: does nothing", f)
	case f.Short%SectorSize != 0:
		return fmt.Errorf("fault %q: the short write is not a multiple of %d bytes", f, SectorSize)
	case f.Short > 0 && f.Errno == 0:
		return fmt.Errorf("fault %q: a short write without an error", f)
	}
	return nil
}

// FaultStats is how far a Fault has come. A test that fails the k-th write
// for k = 0, 1, 2 … is done when Hits stays 0.
type FaultStats struct {
	ID      int `json:"id"`
	Matched int `json:"matched"` // requests that it concerns
	Hits    int `json:"hits"`
}

// armed is a Fault in the server.
type armed struct {
	Fault
	FaultStats
}

// strikes counts a request and reports whether the fault hits it.
func (a *armed) strikes(op Op, r Range) bool {
	if a.Op&op == 0 {
		return false
	}
	if len(a.Ranges) > 0 && op != OpFlush {
		var inside bool
		for _, x := range a.Ranges {
			inside = inside || x.Overlaps(r)
		}
		if !inside {
			return false
		}
	}
	a.Matched++
	if a.Matched <= a.Skip || (a.Matched-a.Skip-1)%max(1, a.Every) != 0 || a.Times > 0 && a.Hits >= a.Times {
		return false
	}
	a.Hits++
	return true
}
