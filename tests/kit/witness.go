package kit

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
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

// Observations returns what a witness has printed to a file, in order. A last
// line that is not complete is left out.
func Observations(file string) (all []Observation, err error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(text[:strings.LastIndexByte(string(text), '\n')+1])) {
		var o Observation
		if err := json.Unmarshal([]byte(line), &o); err != nil {
			return nil, fmt.Errorf("%s: %q: %w", file, line, err)
		}
		all = append(all, o)
	}
	return all, nil
}
