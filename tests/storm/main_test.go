package storm

import (
	"flag"
	"os"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

var (
	rounds      = flag.Int("rounds", 3, "rounds on each file system")
	duration    = flag.Duration("for", 0, "instead of -rounds: the time that the storms of all file systems take together")
	seed        = flag.Uint64("seed", 0, "of all random decisions; 0: of the clock")
	fsList      = flag.String("fs", "ext4,xfs,btrfs", "file systems, one after another")
	actorList   = flag.String("actors", "", "the actors that act, or, with - in front, that do not; all when empty")
	snapshotter = flag.String("snapshotter", durable, "durable or overlayfs")
	keep        = flag.String("keep", "/var/tmp", "where the directory with the evidence of a violation is made")
	goOn        = flag.Bool("go-on", false, "count violations, and go on")
	every       = flag.Int("every", 1, "rounds per printed line")
)

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(kit.Main(func() int { return kit.InMemory(m.Run) }))
}

var (
	check   = kittest.Check
	scratch = kittest.Scratch
)

func must[T any](t testing.TB) func(T, error) T { return kittest.Must[T](t) }
