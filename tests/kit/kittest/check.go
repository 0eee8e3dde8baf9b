package kittest

import (
	"strings"
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

// NoPanic fails the test when a program's log shows the end of a goroutine.
func NoPanic(t testing.TB, log string) {
	t.Helper()
	for _, word := range []string{"panic", "goroutine "} {
		if strings.Contains(log, word) {
			t.Errorf("the log contains %q:\n%s", word, log)
		}
	}
}

// slack is how much longer than on a machine of its own a test may wait.
const slack = 4

// WaitFor polls until ok returns nil, less and less often, and ends the test with
// its last error after the limit, which is that of a machine without other work:
// it waits four times as long.
func WaitFor(t testing.TB, limit time.Duration, ok func() error) {
	t.Helper()
	pause := 20 * time.Millisecond
	for deadline := time.Now().Add(slack * limit); ; time.Sleep(pause) {
		pause = min(pause*5/4, 300*time.Millisecond)
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v: %v", slack*limit, err)
		}
	}
}
