package upgrade

import (
	"flag"
	"os"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

var (
	upgrades = flag.Int("upgrades", 3, "how often the program is replaced")
	seed     = flag.Uint64("seed", 1, "of what is pulled, and of the time between two upgrades")
)

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(kit.Main(func() int { return kit.InMemory(m.Run) }))
}
