package idle

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLimit(1000)
		began := time.Now()
		step := func(n int, want time.Duration) {
			t.Helper()
			if err := l.Wait(t.Context(), n); err != nil {
				t.Fatal(err)
			}
			if got := time.Since(began); got != want {
				t.Errorf("let through after %v, not %v", got, want)
			}
		}
		step(500, 0)
		step(1500, 500*time.Millisecond)
		step(0, 2*time.Second)
		time.Sleep(10 * time.Second)
		step(1000, 12*time.Second) // nothing was saved up meanwhile
		step(1000, 13*time.Second)

		var all sync.WaitGroup // four take turns: they share what there is
		began = time.Now()
		for range 4 {
			all.Go(func() {
				for range 10 {
					if err := l.Wait(t.Context(), 100); err != nil {
						t.Error(err)
					}
				}
			})
		}
		all.Wait()
		// One second is still owed, and the last one does not wait for its own.
		if got := time.Since(began); got != time.Second+4*time.Second-100*time.Millisecond {
			t.Errorf("4000 bytes took %v", got)
		}
	})
}

func TestLimitEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		l := NewLimit(1)
		if err := l.Wait(ctx, 3600); err != nil {
			t.Fatal(err)
		}
		if err := l.Wait(ctx, 1); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v", err)
		}
		if err := NewLimit(0).Wait(ctx, 1); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("without a limit: error %v", err)
		}
	})
}

func TestNoLimit(t *testing.T) {
	for range 1000 {
		if err := NewLimit(0).Wait(t.Context(), 1<<40); err != nil {
			t.Fatal(err)
		}
	}
}
