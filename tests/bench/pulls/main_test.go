package pulls

import (
	"os"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	_ "github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest" // keeps the main thread
)

func TestMain(m *testing.M) {
	Init()
	os.Exit(kit.Main(m.Run))
}
