package bench

import (
	"os"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

var (
	newDisk = kittest.NewDisk
	scratch = kittest.Scratch
)

func TestMain(m *testing.M) { os.Exit(kit.Main(m.Run)) }
