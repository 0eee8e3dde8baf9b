package commit

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// TestWritebackBegins: what another program extracts is on its way to the disk before its
// Commit. The kernel alone would begin after 30 seconds (dirty_expire_centisecs). Of what a
// container writes, the daemon has nothing written.
func TestWritebackBegins(t *testing.T) {
	for _, fs := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fs, func(t *testing.T) {
			t.Parallel()
			disk := newDisk(t, kit.DiskOptions{FS: fs, Size: 512 << 20})
			sn := start(t, newDaemon(t, kit.DaemonOptions{Dir: disk.Path()}))
			write := func(key string) int64 {
				dir := filepath.Join(upper(t, must[mounts](t)(sn.Prepare(t.Context(), key, ""))), "usr", "lib")
				check(t, os.MkdirAll(dir, 0o755))
				before := written(t, disk)
				check(t, os.WriteFile(dir+"/large", bytes.Repeat([]byte("content "), 4<<20), 0o644))
				return before
			}
			container := write("a container")
			time.Sleep(3 * time.Second)
			if n := written(t, disk) - container; n > 8<<20 {
				t.Errorf("%d bytes of a container are written", n)
			}
			key := "default/1/extract-1-abcd sha256:" + strings.Repeat("1", 64)
			before := write(key)
			waitFor(t, 25*time.Second, func() error {
				if n := written(t, disk) - before; n < 32<<20 {
					return fmt.Errorf("%d of 32 MiB are written", n>>20)
				}
				return nil
			})
			check(t, sn.Commit(t.Context(), "default/2/sha256:"+strings.Repeat("1", 64), key))
		})
	}
}

// written is how many bytes were written to a disk (Documentation/block/stat.rst).
func written(t *testing.T, disk *kit.Disk) int64 {
	t.Helper()
	fields := strings.Fields(string(must[[]byte](t)(os.ReadFile("/sys/block/" + filepath.Base(disk.Device()) + "/stat"))))
	return 512 * must[int64](t)(strconv.ParseInt(fields[6], 10, 64))
}
