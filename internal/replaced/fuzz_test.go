package replaced

import (
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
)

// FuzzUsers: a file of users is refused, or is read as it is written again; no options of a
// mount end the daemon.
func FuzzUsers(f *testing.F) {
	f.Add([]byte(`{"overlays":["0:51"],"rows":[3,4],"highest":7,"settled":true}`), "rw,lowerdir=/r/snapshots/12/fs:3/fs,upperdir=/r/snapshots/40/fs,workdir=/x")
	f.Add([]byte(`{"highest":-1}`), "upperdir=99999999999999999999/fs")
	f.Add([]byte(`{}`), "upperdir=00000000000000000001/fs") // no directory of ours
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte, options string) {
		treetest.Check(t, os.WriteFile(filepath.Join(dir, usersFile), data, 0o600))
		if u, err := readUsers(dir); err == nil {
			treetest.Check(t, writeUsers(dir, u))
			if again, err := readUsers(dir); err != nil || !reflect.DeepEqual(u, again) {
				t.Errorf("%+v became %+v, %v", u, again, err)
			}
		}
		// A mount that writes to a snapshot names it.
		if id := upperOf(options); id > 0 && !namesLayer(options, id) {
			t.Errorf("writes to %d, and does not name it", id)
		}
	})
}
