package published

import (
	"fmt"
	"math"
	"slices"
)

// Spread is the median of measurements with its quartiles.
type Spread struct{ Q1, Median, Q3 float64 }

// SpreadOf interpolates between neighbors, as R and NumPy do. That of nothing is not a number.
func SpreadOf(values []float64) Spread {
	sorted := slices.Sorted(slices.Values(values))
	at := func(q float64) float64 {
		if len(sorted) == 0 {
			return math.NaN()
		}
		below, part := math.Modf(q * float64(len(sorted)-1))
		i := int(below)
		next := min(i+1, len(sorted)-1)
		return sorted[i] + part*(sorted[next]-sorted[i])
	}
	return Spread{at(0.25), at(0.5), at(0.75)}
}

// Text is the median with the quartiles; a dash for what is not a number.
func (s Spread) Text(digits int) string {
	if math.IsNaN(s.Median) {
		return "–"
	}
	return fmt.Sprintf("%.*f (%.*f–%.*f)", digits, s.Median, digits, s.Q1, digits, s.Q3)
}

// Number is a figure; a dash for what is not a number.
func Number(v float64, digits int) string {
	if math.IsNaN(v) {
		return "–"
	}
	return fmt.Sprintf("%.*f", digits, v)
}
