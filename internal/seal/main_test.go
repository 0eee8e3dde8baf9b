package seal

import (
	"path/filepath"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/internal/contents"
	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
)

func TestMain(m *testing.M) { treetest.Main(m) }

// What the tests of several packages share.
var (
	check              = treetest.Check
	withContent        = treetest.WithContent
	everyKind          = treetest.EveryKind
	still              = treetest.Still
	run                = treetest.Run
	formatted          = treetest.Formatted
	withoutDescriptors = treetest.WithoutDescriptors
	text               = treetest.Text
	packText           = treetest.Pack
	tarOf              = treetest.Tar
	flip               = treetest.Flip
	join               = treetest.Join
)

// contentsOf takes the digests of a tree's content and returns where, and that of the list.
func contentsOf(t testing.TB, root string) (path, digest string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "contents")
	digest, err := contents.Write(t.Context(), root, path, contents.Reading{})
	check(t, err)
	return path, digest
}
