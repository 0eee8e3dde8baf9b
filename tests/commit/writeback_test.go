package commit

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// TestWritebackBegins: the daemon has the kernel begin to write what another program extracts
// before its Commit, and nothing of what a container writes.
func TestWritebackBegins(t *testing.T) {
	for _, fs := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fs, func(t *testing.T) {
			t.Parallel()
			disk := newDisk(t, kit.DiskOptions{FS: fs, Size: 512 << 20})
			d, tr := traced(t, kit.DaemonOptions{Dir: disk.Path()})
			sn := start(t, d)
			write := func(key string) {
				dir := filepath.Join(upper(t, must[mounts](t)(sn.Prepare(t.Context(), key, ""))), "usr", "lib")
				check(t, os.MkdirAll(dir, 0o755))
				check(t, os.WriteFile(filepath.Join(dir, strings.ReplaceAll(key[:9], "/", "-")), make([]byte, 1<<20), 0o644))
			}
			l := chain(1, "written")[0]
			write("container/1")
			write(l.key)
			begun := func() (all []string) {
				for line := range strings.Lines(string(must[[]byte](t)(os.ReadFile(tr.file)))) {
					if strings.Contains(line, "sync_file_range(") && strings.Contains(line, "/usr/lib/") {
						all = append(all, line)
					}
				}
				return all
			}
			waitFor(t, 5*time.Minute, func() error {
				if len(begun()) == 0 {
					return fmt.Errorf("nothing is being written")
				}
				return nil
			})
			check(t, l.commit(t.Context(), sn))
			for _, line := range begun() {
				if !strings.Contains(line, "/usr/lib/default-1>") {
					t.Errorf("this is of a container: %s", line)
				}
			}
		})
	}
}
