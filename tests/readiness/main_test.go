package readiness

import (
	"context"
	"flag"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

var update = flag.Bool("update", false, "write testdata/answers.txt from what this run has seen")

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(kit.Main(m.Run))
}

var binaries = sync.OnceValues(func() (kit.Binaries, error) { return kit.Build(context.Background()) })

// must returns a function that unwraps a result and ends the test on an error.
func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// waitFor polls until ok returns nil, and fails with its last error.
func waitFor(t testing.TB, limit time.Duration, ok func() error) {
	t.Helper()
	for deadline := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v: %v", limit, err)
		}
	}
}

// memory is a tmpfs: what is tested here is who says what about a layer, not how
// long a disk takes to sync it. It goes with the namespace that kit.Main makes.
var memory = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "m")
	if err != nil {
		return "", err
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=8g"); err != nil {
		return "", fmt.Errorf("mount a tmpfs: %w", err)
	}
	return dir, nil
})

// scratch is a directory in memory. Its name is short: the path of a unix socket
// has room for 107 bytes, and t.TempDir spells out the test's whole name.
func scratch(t testing.TB) string {
	t.Helper()
	dir := must[string](t)(os.MkdirTemp(must[string](t)(memory()), "t"))
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}
