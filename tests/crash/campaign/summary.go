package campaign

import (
	"fmt"
	"slices"
	"strings"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
)

// Summary are the counts of a campaign.
type Summary struct {
	Options    Options
	Done       bool
	States     int
	Nested     int // states among them of a second cut
	Same       int // states whose content was that of another one
	Points     int
	Retried    int // layers extracted again
	Healing    int // states in the middle of a healing
	Survived   int
	Lost       int
	Lies       int
	Flawed     int
	Unmeasured int
	Recordings []string // in order
	Seconds    float64  // of all sessions
	Sessions   int
	Gates      []Gate
	Bad        []Line // those that did not survive, without those not measured
	Unlooked   []Line // those not measured
	Notes      []Gate // of containerd itself
}

// Summary counts.
func (s *Store) Summary() *Summary {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := &Summary{Options: s.Options}
	seen := map[string]bool{}
	sessions := map[int]float64{}
	for _, l := range s.Lines {
		out.States++
		out.Points += l.Points
		out.Retried += l.Retried
		if l.Healing > 0 {
			out.Healing++
		}
		if l.Same {
			out.Same++
		}
		if strings.Contains(l.ID, ">") {
			out.Nested++
		}
		if name := l.Recording(); !seen[name] {
			seen[name] = true
			out.Recordings = append(out.Recordings, name)
		}
		sessions[l.Session] = max(sessions[l.Session], l.At)
		if l.Lost {
			out.Lost++
		}
		if l.Lie {
			out.Lies++
		}
		switch l.Verdict {
		case lab.Survived.String():
			out.Survived++
			continue
		case lab.NotMeasured.String():
			out.Unmeasured++
			out.Unlooked = append(out.Unlooked, l)
			continue
		case lab.Flawed.String():
			out.Flawed++
		}
		out.Bad = append(out.Bad, l)
	}
	for _, g := range s.Gates {
		if g.Kind == noteContainerd {
			out.Notes = append(out.Notes, g)
		} else {
			out.Gates = append(out.Gates, g)
		}
	}
	for _, seconds := range sessions {
		out.Seconds += seconds
	}
	out.Sessions = len(sessions)
	out.Done = out.States >= s.Options.States || s.Options.First && len(out.Bad) > 0
	return out
}

// noteContainerd is the kind of a line among the gates that is none: what went
// wrong in containerd itself, which is not the snapshotter's.
const noteContainerd = "containerd"

// Rate is states a second.
func (s *Summary) Rate() float64 {
	if s.Seconds <= 0 {
		return 0
	}
	return float64(s.States) / s.Seconds
}

// Good reports whether nothing was found and every gate held.
func (s *Summary) Good() bool {
	held := !slices.ContainsFunc(s.Gates, func(g Gate) bool { return !g.Holds() })
	return len(s.Bad) == 0 && held && s.Survived > 0
}

// count of the gates of a kind, and of those that hold.
func (s *Summary) count(kind string) (held, all int) {
	for _, g := range s.Gates {
		if g.Kind == kind {
			all++
			if g.Holds() {
				held++
			}
		}
	}
	return held, all
}

// control returns on which file systems the built-in overlayfs lost layers.
func (s *Summary) control() string {
	var lost, kept []string
	for _, g := range s.Gates {
		switch {
		case g.Kind != gateControl:
		case !g.Caught:
			kept = append(kept, g.FS)
		case !slices.Contains(lost, g.FS): // there may be two controls
			lost = append(lost, g.FS)
		}
	}
	switch {
	case len(kept) > 0:
		return "control SURVIVED on " + strings.Join(kept, ", ")
	case len(lost) == 0:
		return "no control"
	}
	return "control lost on " + strings.Join(lost, ", ")
}

func (s *Summary) mutants() string {
	held, all := s.count(gateMutant)
	text := fmt.Sprintf("mutants %d of %d caught", held, all)
	if all == 0 {
		text = "no mutants"
	}
	if held, all := s.count(gateNone); held < all {
		text += ", AND ONE WHERE THERE IS NONE"
	}
	return text
}

// Line is the end of a campaign in one line.
func (s *Summary) Line() string {
	text := fmt.Sprintf("%d states, %d lost, %d lies, %d flawed, %d not measured; %s; %s; %.1f states/s",
		s.States, s.Lost, s.Lies, s.Flawed, s.Unmeasured, s.control(), s.mutants(), s.Rate())
	if !s.Done {
		text += "; NOT COMPLETE"
	}
	return text
}

// String is the whole summary, for people.
func (s *Summary) String() string {
	var b strings.Builder
	what := "durable-snapshotter"
	if f := s.Options.Foreign; f != nil {
		what = f.Start
	}
	var kinds []string
	for _, fs := range s.Options.FS {
		kinds = append(kinds, string(fs))
	}
	fmt.Fprintf(&b, "under test       %s\n", what)
	fmt.Fprintf(&b, "workload         %s on %s, seeds from %d\n", s.Options.Workload, strings.Join(kinds, ", "), s.Options.Seed)
	fmt.Fprintf(&b, "recordings       %d\n", len(s.Recordings))
	fmt.Fprintf(&b, "states           %d, of these %d of a second cut during recovery\n", s.States, s.Nested)
	fmt.Fprintf(&b, "same content     %d of them, as another one that was examined\n", s.Same)
	fmt.Fprintf(&b, "points judged    %d\n", s.Points)
	fmt.Fprintf(&b, "extracted again  %d layers, after the crash\n", s.Retried)
	if s.Healing > 0 {
		fmt.Fprintf(&b, "healing          %d states in the middle of one\n", s.Healing)
	}
	fmt.Fprintf(&b, "survived         %d\nlost             %d\nlies             %d\nflawed           %d\nnot measured     %d\n",
		s.Survived, s.Lost, s.Lies, s.Flawed, s.Unmeasured)
	fmt.Fprintf(&b, "time             %.0f s in %d sessions, %.1f states/s\n", s.Seconds, s.Sessions, s.Rate())
	for _, g := range s.Gates {
		verdict := "caught"
		if !g.Caught {
			verdict = "not caught"
		}
		if !g.Holds() {
			verdict = strings.ToUpper(verdict)
		}
		fmt.Fprintf(&b, "%-8s %-26s %-6s %s in %d states, %.1f s\n", g.Kind, g.Name, g.FS, verdict, g.States, g.Seconds)
	}
	for _, g := range s.Notes {
		fmt.Fprintf(&b, "containerd       %s: %s\n", g.Name, g.Finding)
	}
	for i, l := range append(slices.Clone(s.Bad), s.Unlooked...) {
		if i == 20 {
			fmt.Fprintf(&b, "and %d more states that did not survive\n", len(s.Bad)+len(s.Unlooked)-i)
			break
		}
		fmt.Fprintf(&b, "%s: %s\n", l.ID, strings.ReplaceAll(l.Why, "\n", "\n    "))
	}
	return b.String()
}
