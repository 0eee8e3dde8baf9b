package idle

import (
	"context"
	"sync"
	"time"
)

// Limit limits work to a rate. Several goroutines may share one. A nil Limit does not
// limit anything.
type Limit struct {
	rate int64 // bytes per second

	mu   sync.Mutex
	free time.Time // when what has been let through so far is paid for
}

// NewLimit returns a limit of so many bytes per second, nil for none.
func NewLimit(rate int64) *Limit {
	if rate <= 0 {
		return nil
	}
	return &Limit{rate: rate}
}

// Wait waits until n more bytes may be read, or until the context is done. Time
// that was not used is not credited: work that was delayed elsewhere must not be followed
// by a burst.
func (l *Limit) Wait(ctx context.Context, n int) error {
	if err := ctx.Err(); err != nil || l == nil {
		return err
	}
	now := time.Now()
	l.mu.Lock()
	start := now
	if l.free.After(now) {
		start = l.free
	}
	l.free = start.Add(time.Duration(float64(n) / float64(l.rate) * float64(time.Second)))
	l.mu.Unlock()
	if start == now {
		return nil
	}
	timer := time.NewTimer(start.Sub(now))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
