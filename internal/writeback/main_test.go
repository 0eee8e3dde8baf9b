package writeback

import (
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
)

func TestMain(m *testing.M) { treetest.Main(m) }
