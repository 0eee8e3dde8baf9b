package campaign

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
)

// Store is the directory of a campaign.
type Store struct {
	Dir     string
	Options Options
	Share   int // of each recording; does not change when States does
	Tested  string
	Gates   []Gate
	Lines   []Line

	mu      sync.Mutex // guards Lines and results
	done    map[string]bool
	results *os.File
	gates   *os.File
	session int
	began   time.Time
}

// Gate is what a gate has found.
type Gate struct {
	Kind    string // control, mutant, or none: no defect, which must not be caught
	Name    string
	Mistake string
	By      string
	FS      string
	Caught  bool
	States  int
	First   string // state that caught it
	Finding string
	Seconds float64
}

// Holds reports whether the gate is as it must be.
func (g Gate) Holds() bool { return g.Caught == (g.Kind != gateNone) }

// The kinds of gates.
const (
	gateControl = "control"
	gateMutant  = "mutant"
	gateNone    = "none"
)

// Line is the result of one state.
type Line struct {
	ID      string  `json:"id"`
	Verdict string  `json:"verdict"`
	Lost    bool    `json:"lost,omitempty"`
	Lie     bool    `json:"lie,omitempty"`
	Points  int     `json:"points"`
	Acked   int     `json:"acked"`
	Retried int     `json:"retried,omitempty"`
	Healing int     `json:"healing,omitempty"`
	Same    bool    `json:"same,omitempty"` // its content was that of another disk, which was examined
	Session int     `json:"session"`
	At      float64 `json:"at"` // seconds since the session began
	Why     string  `json:"why,omitempty"`
}

// Recording is the name of the recording that the state is of.
func (l Line) Recording() string {
	name, _, _ := strings.Cut(l.ID, "/")
	return name
}

// Path is the state.
func (l Line) Path() (state.Path, error) {
	_, name, _ := strings.Cut(l.ID, "/")
	return state.ParsePath(name)
}

// header is what stands in options.json.
type header struct {
	Options Options
	Share   int
	Tested  string // sum of the programs under test
}

// ErrOther is returned for a directory that holds another campaign.
var ErrOther = errors.New("the directory holds another campaign")

// Create makes the directory of a campaign, or, if resume is true and it exists,
// opens it to go on. tested identifies the programs under test.
func Create(dir string, o Options, tested string, resume bool) (_ *Store, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("campaign in %s: %w", dir, err)
		}
	}()
	_, err = os.Stat(filepath.Join(dir, "options.json"))
	if err == nil && !resume {
		return nil, fmt.Errorf("it exists; resume it, or name another directory: %w", ErrOther)
	}
	var s *Store
	if err == nil {
		if s, err = Open(dir); err != nil {
			return nil, err
		}
		if err := s.same(o, tested); err != nil {
			return nil, err
		}
		s.Options.States, s.Options.First = o.States, o.First
	} else {
		s = &Store{Dir: dir, Options: o, Share: o.share(), Tested: tested, done: map[string]bool{}}
		if err := os.MkdirAll(filepath.Join(dir, "recordings"), 0o755); err != nil {
			return nil, err
		}
		text, err := json.MarshalIndent(header{o, s.Share, tested}, "", "\t")
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(dir, "options.json"), append(text, '\n'), 0o644); err != nil {
			return nil, err
		}
	}
	s.began = time.Now()
	for _, l := range s.Lines {
		s.session = max(s.session, l.Session+1)
	}
	if s.results, err = appendTo(filepath.Join(dir, "results.jsonl")); err != nil {
		return nil, err
	}
	s.gates, err = appendTo(filepath.Join(dir, "gates.jsonl"))
	return s, err
}

// appendTo opens a file of lines. A line without an end is from a campaign that
// was killed while writing it; its state will be examined again.
func appendTo(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(path)
	if err == nil {
		end := int64(bytes.LastIndexByte(text, '\n') + 1)
		err = f.Truncate(end)
		if err == nil {
			_, err = f.Seek(end, 0)
		}
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func (s *Store) same(o Options, tested string) error {
	states := s.Options.States
	s.Options.States = o.States
	defer func() { s.Options.States = states }()
	mine, err := json.Marshal(s.Options)
	if err != nil {
		return err
	}
	theirs, err := json.Marshal(o)
	if err != nil {
		return err
	}
	if !bytes.Equal(mine, theirs) {
		return fmt.Errorf("it was begun with %s, not with %s: %w", mine, theirs, ErrOther)
	}
	if s.Tested != tested {
		return fmt.Errorf("the programs under test have changed since it began; begin a new one in another directory (--state-dir, CRASH_DIR= of make): %w", ErrOther)
	}
	return nil
}

// Open reads the directory of a campaign.
func Open(dir string) (*Store, error) {
	text, err := os.ReadFile(filepath.Join(dir, "options.json"))
	if err != nil {
		return nil, err
	}
	var h header
	if err := json.Unmarshal(text, &h); err != nil {
		return nil, fmt.Errorf("options.json: %w", err)
	}
	s := &Store{Dir: dir, Options: h.Options, Share: h.Share, Tested: h.Tested, done: map[string]bool{}}
	if s.Gates, err = readLines[Gate](filepath.Join(dir, "gates.jsonl")); err != nil {
		return nil, err
	}
	if s.Lines, err = readLines[Line](filepath.Join(dir, "results.jsonl")); err != nil {
		return nil, err
	}
	for _, l := range s.Lines {
		s.done[l.ID] = true
	}
	return s, nil
}

func readLines[T any](path string) ([]T, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []T
	in := bufio.NewReaderSize(f, 1<<20)
	for {
		line, err := in.ReadBytes('\n')
		if err != nil {
			return out, nil // at the end, or in the middle of the last line
		}
		var v T
		if err := json.Unmarshal(line, &v); err != nil {
			return nil, fmt.Errorf("%s: line %d: %w", path, len(out)+1, err)
		}
		out = append(out, v)
	}
}

// Close closes the files.
func (s *Store) Close() error {
	return errors.Join(s.results.Close(), s.gates.Close())
}

// result adds a result and returns how many there are.
func (s *Store) result(r lab.Result) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := Line{
		ID: r.ID, Verdict: r.Verdict.String(), Points: r.Points, Acked: r.Acked, Retried: r.Retried, Healing: r.Healing, Same: r.Same,
		Lost: oracle.Has(r.Findings, oracle.Lost), Lie: oracle.Has(r.Findings, oracle.Lie),
		Session: s.session, At: time.Since(s.began).Seconds(),
	}
	if r.Verdict != lab.Survived {
		_, l.Why, _ = strings.Cut(r.String(), ": ")
	}
	s.Lines = append(s.Lines, l)
	s.done[l.ID] = true
	return len(s.Lines), writeLine(s.results, l)
}

func (s *Store) gate(g Gate) error {
	s.Gates = append(s.Gates, g)
	return writeLine(s.gates, g)
}

func writeLine(f *os.File, v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = f.Write(append(text, '\n'))
	return err
}

// isDone reports whether a state was examined.
func (s *Store) isDone(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.done[id]
}

// RecordingDir is where a recording is kept.
func (s *Store) RecordingDir(id string) string { return filepath.Join(s.Dir, "recordings", id) }

// secondLog is where the log of a recovery that was cut again is kept.
func (s *Store) secondLog(id string, first state.State) string {
	return filepath.Join(s.RecordingDir(id), first.String()+".zst")
}

// sumOf identifies programs.
func sumOf(paths ...string) (string, error) {
	h := sha256.New()
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			return "", err
		}
		sum := sha256.Sum256(text)
		h.Write(sum[:])
	}
	return fmt.Sprintf("%x", h.Sum(nil)), nil
}
