package contents

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
)

func TestMain(m *testing.M) { treetest.Main(m) }

// What the tests of several packages share.
var (
	check       = treetest.Check
	withContent = treetest.WithContent
	still       = treetest.Still
	run         = treetest.Run
	formatted   = treetest.Formatted
	text        = treetest.Text
	tarOf       = treetest.Tar
	flip        = treetest.Flip
	flipIn      = treetest.FlipIn
	join        = treetest.Join
)

// sealOf seals a tree and returns where, and the summary.
func sealOf(t testing.TB, root string) (string, seal.Summary) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "seal")
	s, err := seal.Write(context.Background(), root, path)
	check(t, err)
	return path, s
}
