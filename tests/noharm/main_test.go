package noharm

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

func TestMain(m *testing.M) {
	disk.Init()
	kit.Parallel(6)
	os.Exit(kit.Main(func() int { return kit.InMemory(m.Run) }))
}

var (
	check   = kittest.Check
	waitFor = kittest.WaitFor
	scratch = kittest.Scratch
)

func must[T any](t testing.TB) func(T, error) T { return kittest.Must[T](t) }

// command runs a program and ends the test when it fails.
func command(t testing.TB, argv ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), argv[0], argv[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(argv, " "), err, out)
	}
}
