package matrix

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

func TestMain(m *testing.M) { os.Exit(kit.Main(m.Run)) }

var check = kittest.Check

func must[T any](t testing.TB) func(T, error) T { return kittest.Must[T](t) }

// attempt is a job on a node. What fails in it ends the job, and is recorded: whether the
// test fails with it is a matter of the table.
type attempt struct {
	testing.TB
	failures []string
	cleanups []func()
}

// try runs a job to its end.
func try(t testing.TB, do func(testing.TB, *node), n *node) (failures []string) {
	a := &attempt{TB: t}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer func() {
			for _, f := range slices.Backward(a.cleanups) {
				f()
			}
		}()
		do(a, n)
	}()
	<-ended
	return a.failures
}

func (a *attempt) Error(args ...any) { a.record(fmt.Sprint(args...)) }

func (a *attempt) Errorf(format string, args ...any) { a.record(fmt.Sprintf(format, args...)) }

func (a *attempt) Fatal(args ...any) {
	a.record(fmt.Sprint(args...))
	runtime.Goexit()
}

func (a *attempt) Fatalf(format string, args ...any) { a.Fatal(fmt.Sprintf(format, args...)) }

func (a *attempt) Fail() { a.record("failed") }

func (a *attempt) FailNow() { a.Fatal("failed") }

func (a *attempt) Failed() bool { return len(a.failures) > 0 }

// Cleanup calls f at the end of the job, not of the test.
func (a *attempt) Cleanup(f func()) { a.cleanups = append(a.cleanups, f) }

func (a *attempt) record(text string) { a.failures = append(a.failures, strings.TrimSpace(text)) }

// TestAttempt: a job that fails is seen to fail, and ends where it fails.
func TestAttempt(t *testing.T) {
	var steps []string
	got := try(t, func(t testing.TB, _ *node) {
		t.Cleanup(func() { steps = append(steps, "cleanup") })
		t.Errorf("first %d", 1)
		steps = append(steps, "goes on")
		check(t, fmt.Errorf("second"))
		steps = append(steps, "does not get here")
	}, nil)
	if want := []string{"first 1", "second"}; !slices.Equal(got, want) {
		t.Errorf("recorded %q, want %q", got, want)
	}
	if want := []string{"goes on", "cleanup"}; !slices.Equal(steps, want) {
		t.Errorf("did %q, want %q", steps, want)
	}
	if got := try(t, func(testing.TB, *node) {}, nil); got != nil {
		t.Errorf("recorded %q of a job that does nothing", got)
	}
}
