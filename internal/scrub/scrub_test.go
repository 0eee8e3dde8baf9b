package scrub

import (
	"testing"
	"time"
)

// TestScrubIntervalNeedsNoClock: a round whose start lies in the future, or far in
// the past, stops no round.
func TestScrubIntervalNeedsNoClock(t *testing.T) {
	now := time.Date(2026, 11, 29, 0, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		started time.Time
		want    time.Duration
	}{
		{now.Add(-time.Minute), 59 * time.Minute},
		{now.Add(-2 * time.Hour), 0},
		{now.AddDate(72, 0, 0), 0},
		{time.Unix(0, 0), 0},
	} {
		if got := untilNext(c.started, now, time.Hour); got != c.want {
			t.Errorf("started %v: next in %v, want %v", c.started, got, c.want)
		}
	}
}
