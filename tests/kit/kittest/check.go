package kittest

import (
	"testing"
	"time"
)

// Must returns a function that unwraps a result and ends the test on an error.
func Must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// Check ends the test on an error.
func Check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// WaitFor polls until ok returns nil, less and less often, and ends the test with
// its last error after the limit.
func WaitFor(t testing.TB, limit time.Duration, ok func() error) {
	t.Helper()
	pause := 20 * time.Millisecond
	for deadline := time.Now().Add(limit); ; time.Sleep(pause) {
		pause = min(pause*5/4, 300*time.Millisecond)
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v: %v", limit, err)
		}
	}
}
