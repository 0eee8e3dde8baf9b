package lab

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
)

// Verdict on one state.
type Verdict uint8

// The verdicts, from good to bad.
const (
	Survived Verdict = iota
	NotMeasured
	Flawed
	Lost
	Lied
)

var verdictNames = []string{"survived", "not measured", "flawed", "lost", "lie"}

func (v Verdict) String() string { return verdictNames[v] }

// Result is the verdict on one state and its reasons.
type Result struct {
	ID       string // of the recording, a slash, the path of the state
	Path     state.Path
	Points   int // at how many points the power may go and leave this disk
	Acked    int // committed names promised at the last of them
	Verdict  Verdict
	Findings []oracle.Finding // of the point with the most serious ones
	Reason   string           // why it was not measured
	Same     bool             // not examined: its content was that of another disk, which was
	Retried  int              // layers extracted again
	Healing  int              // trees that were being extracted in the place of damaged ones
	Took     time.Duration
}

func (r Result) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s", r.ID, r.Verdict)
	if r.Reason != "" {
		fmt.Fprintf(&b, ": %s", r.Reason)
	}
	for i, f := range r.Findings {
		if i == 3 {
			fmt.Fprintf(&b, "\n  and %d more findings", len(r.Findings)-i)
			break
		}
		lines := strings.Split(strings.TrimSpace(f.String()), "\n")
		if len(lines) > 4 {
			lines = append(lines[:4], "…")
		}
		fmt.Fprintf(&b, "\n  %s", strings.Join(lines, "\n    "))
	}
	return b.String()
}

// Tally counts results. It may be used from several goroutines.
type Tally struct {
	mu sync.Mutex

	Counts
	Bad []Result // those that did not survive, as many as keep
}

// Counts of a Tally.
type Counts struct {
	States      int           // distinct disks
	Same        int           // of which the content was that of another one
	Points      int           // points judged
	Nested      int           // states among them that are a second cut
	Retried     int           // layers extracted again after a crash
	Healing     int           // states in which the power went in the middle of a healing
	Survived    int           //
	Lost        int           // states by verdict; a lie about a lost layer counts in both
	Lies        int           //
	Flawed      int           //
	NotMeasured int           //
	Elapsed     time.Duration // of the wall clock
	CPU         time.Duration // of this process and of the snapshotters that it has started; what kernel threads do is not in it
	FirstBad    int           // how many states had been examined when the first did not survive, 0: none
}

// keep bounds what a Tally remembers of bad states.
const keep = 50

func (t *Tally) add(r Result, retried int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.States++
	if r.Same {
		t.Same++
	}
	t.Points += r.Points
	t.Retried += retried
	if r.Healing > 0 {
		t.Healing++
	}
	if len(r.Path) > 1 {
		t.Nested++
	}
	if r.Verdict == Survived {
		t.Survived++
		return
	}
	if oracle.Has(r.Findings, oracle.Lost) {
		t.Lost++
	}
	if oracle.Has(r.Findings, oracle.Lie) {
		t.Lies++
	}
	switch r.Verdict {
	case Flawed:
		t.Flawed++
	case NotMeasured:
		t.NotMeasured++
	}
	if r.Verdict != NotMeasured && t.FirstBad == 0 {
		t.FirstBad = t.States
	}
	if len(t.Bad) < keep {
		t.Bad = append(t.Bad, r)
	}
}

// Add adds the counts of another tally, of other states.
func (t *Tally) Add(o *Tally) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.FirstBad == 0 && o.FirstBad > 0 {
		t.FirstBad = t.States + o.FirstBad
	}
	t.States += o.States
	t.Same += o.Same
	t.Points += o.Points
	t.Nested += o.Nested
	t.Retried += o.Retried
	t.Healing += o.Healing
	t.Survived += o.Survived
	t.Lost += o.Lost
	t.Lies += o.Lies
	t.Flawed += o.Flawed
	t.NotMeasured += o.NotMeasured
	t.Elapsed += o.Elapsed
	t.CPU += o.CPU
	t.Bad = append(t.Bad, o.Bad[:min(len(o.Bad), keep-min(keep, len(t.Bad)))]...)
}

// Measure begins to measure the time of a check, and returns what ends that.
func (t *Tally) Measure() (end func()) {
	began, before := time.Now(), cpuTime()
	return func() { t.Elapsed, t.CPU = time.Since(began), cpuTime()-before }
}

func cpuTime() time.Duration {
	var sum time.Duration
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var u unix.Rusage
		if err := unix.Getrusage(who, &u); err != nil {
			return 0
		}
		sum += time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	return sum
}

// Rate is states a second.
func (c Counts) Rate() float64 {
	if c.Elapsed <= 0 {
		return 0
	}
	return float64(c.States) / c.Elapsed.Seconds()
}

// Clean reports whether nothing at all was found.
func (c Counts) Clean() bool { return c.Survived+c.NotMeasured == c.States }

func (c Counts) String() string {
	healing := ""
	if c.Healing > 0 {
		healing = fmt.Sprintf("; %d in the middle of a healing", c.Healing)
	}
	return fmt.Sprintf("%d states (%d of a second cut, %d of the same content as another) at %d points: %d lost, %d lies, %d flawed, %d not measured%s; %d layers extracted again; %.1f states/s, %.1f ms of CPU each",
		c.States, c.Nested, c.Same, c.Points, c.Lost, c.Lies, c.Flawed, c.NotMeasured, healing, c.Retried, c.Rate(), c.CPU.Seconds()*1000/float64(max(1, c.States)))
}

// Worst lists up to n of the remembered bad states, most serious first.
func (t *Tally) Worst(n int) []Result {
	bad := slices.Clone(t.Bad)
	slices.SortStableFunc(bad, func(a, b Result) int { return int(b.Verdict) - int(a.Verdict) })
	return bad[:min(n, len(bad))]
}
