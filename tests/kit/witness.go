package kit

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
)

// Witness compiles the program tests/damage/witness, which containers run to
// observe their layers, and returns its path.
func Witness(ctx context.Context) (string, error) { return BuildTool(ctx, "damage/witness") }

// Observation is what a witness prints in a round.
type Observation struct {
	Round      int
	Held, Seen map[string]string // content by path: of files held open, and opened in this round
	Count      string            // rounds, as written to a file of the container's own and read again
}

// WitnessLog is the file that a witness prints to. Each line is decoded once, however often
// a test asks.
type WitnessLog struct {
	Path string
	read int64 // offset of the first line that was not decoded
	all  []Observation
}

// Observations returns what the witness has printed so far, in order. A last line that is
// not complete is left for the next call.
func (l *WitnessLog) Observations() ([]Observation, error) {
	f, err := os.Open(l.Path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.NewSectionReader(f, l.read, math.MaxInt64-l.read))
	if err != nil {
		return nil, err
	}
	for line := range bytes.Lines(text[:bytes.LastIndexByte(text, '\n')+1]) {
		var o Observation
		if err := json.Unmarshal(line, &o); err != nil {
			return nil, fmt.Errorf("%s: %q: %w", l.Path, line, err)
		}
		l.read += int64(len(line))
		l.all = append(l.all, o)
	}
	return l.all, nil
}
