package deploy

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// deployed is the directory under test.
const deployed = "../../deploy"

var images kittest.Images

func TestMain(m *testing.M) { images.Main(m) }

var check = kittest.Check

func must[T any](t testing.TB) func(T, error) T { return kittest.Must[T](t) }

// read returns a file below deployed, or beside it.
func read(t testing.TB, name ...string) string {
	t.Helper()
	return string(must[[]byte](t)(os.ReadFile(filepath.Join(append([]string{deployed}, name...)...))))
}
