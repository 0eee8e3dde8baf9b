package idle

import (
	"context"
	"time"
)

// restAtMost is the longest pause after work in the background. It is as long as the
// work was, so that half of the disk's time is left to others.
const restAtMost = time.Second

// RestAfter waits as long as the work lasted that has begun then, and is false when
// ctx has ended.
func RestAfter(ctx context.Context, began time.Time) bool {
	return Rest(ctx, min(time.Since(began), restAtMost))
}

// Rest waits, and is false when ctx has ended.
func Rest(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// Pause spaces the attempts at what keeps failing.
type Pause struct {
	tried time.Time
	next  time.Duration
}

// Begin makes the pause one of a length, whatever it was.
func (p *Pause) Begin(length time.Duration) { p.tried, p.next = time.Now(), length }

// Due reports whether the pause is over.
func (p *Pause) Due() bool { return p.tried.IsZero() || time.Since(p.tried) >= p.next }

// Failed begins a pause that is twice as long as the one before.
func (p *Pause) Failed(first, longest time.Duration) {
	p.Begin(min(max(2*p.next, first), longest))
}
