package commit

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/tests/defects"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

var update = flag.Bool("update", false, "rewrite testdata/golden from what the daemon does")

func goldenFile(operation string) string {
	return filepath.Join("testdata", "golden", operation+".txt")
}

func golden(t *testing.T, operation string) []string {
	t.Helper()
	text := string(must[[]byte](t)(os.ReadFile(goldenFile(operation))))
	return strings.Split(strings.TrimSuffix(text, "\n"), "\n")
}

var operations = []string{"prepare", "commit", "remove"}

// record lets a daemon prepare, commit and remove a layer that has a parent, and
// returns what each took of the disk. Some seconds after its start the daemon
// writes content digests, too; a recording that took as long is made again.
func record(t *testing.T, disk *kit.Disk, o kit.DaemonOptions) map[string][]string {
	t.Helper()
	for try := range 5 {
		o.Dir = disk.Path(fmt.Sprint("durable", try))
		if seen, undisturbed := recordOnce(t, o); undisturbed {
			return seen
		}
	}
	t.Fatal("in each of 5 recordings the daemon wrote content digests in between")
	return nil
}

func recordOnce(t *testing.T, o kit.DaemonOptions) (_ map[string][]string, undisturbed bool) {
	t.Helper()
	d, tr := traced(t, o)
	sn := start(t, d)
	ctx := t.Context()
	parent := chain(1, "parent")[0]
	check(t, parent.unpack(ctx, sn))

	var seen map[string][]string
	// Twice for warmth: metadata.db grows in steps, and is not to grow between.
	for round := range 3 {
		l := chain(2, fmt.Sprint("round", round))[1]
		// Settle what went before: health checks, the parent, the last round.
		must[snapshots.Info](t)(sn.Stat(ctx, parent.name))
		tr.take(t)

		seen = map[string][]string{}
		dir := must[string](t)(l.prepare(ctx, sn))
		seen["prepare"] = tr.take(t)
		check(t, writeLayer(dir, 1))
		check(t, l.commit(ctx, sn))
		seen["commit"] = tr.take(t)
		check(t, sn.Remove(ctx, l.name))
		seen["remove"] = tr.take(t)
		cleanUp(t, sn)
		seen["remove"] = append(seen["remove"], tr.take(t)...)
	}
	check(t, d.Stop())
	all := string(must[[]byte](t)(os.ReadFile(tr.file)))
	return seen, !strings.Contains(all, "/contents.new")
}

// TestGolden compares the order of system calls with the text in testdata. A
// change of the order is a change of these files, for a reviewer to see; -update
// makes it.
func TestGolden(t *testing.T) {
	for _, fs := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fs, func(t *testing.T) {
			disk := newDisk(t, kit.DiskOptions{FS: fs, Size: 512 << 20})
			seen := record(t, disk, kit.DaemonOptions{})
			for _, operation := range operations {
				if *update && fs == "ext4" {
					check(t, os.MkdirAll(filepath.Dir(goldenFile(operation)), 0o755))
					check(t, os.WriteFile(goldenFile(operation), []byte(strings.Join(seen[operation], "\n")+"\n"), 0o644))
				}
				if d := diffLines(golden(t, operation), seen[operation]); d != "" {
					t.Errorf("%s: %s", operation, d)
				}
			}
		})
	}
}

// TestGoldenSeesMutants plants mistakes that only the order shows, and wants
// each to be seen where it was made, and nowhere else.
func TestGoldenSeesMutants(t *testing.T) {
	for mutant, where := range map[string]string{
		"no-dir-fsync":         "prepare",
		"no-syncfs":            "commit",
		"tx-before-syncfs":     "commit",
		"fd-late":              "commit",
		"remove-deletes-first": "remove",
	} {
		t.Run(mutant, func(t *testing.T) {
			disk := newDisk(t, kit.DiskOptions{FS: "ext4", Size: 512 << 20})
			seen := record(t, disk, kit.DaemonOptions{Binary: must[string](t)(defective()), Env: []string{defects.Activate(mutant)}})
			for _, operation := range operations {
				d := diffLines(golden(t, operation), seen[operation])
				if operation == where && d == "" {
					t.Errorf("%s: the trace is that of the golden file", operation)
				}
				if operation != where && d != "" {
					t.Errorf("%s: differs, although the mistake is in %s: %s", operation, where, d)
				}
			}
		})
	}
}

// TestGoldenSeesEveryOrder swaps any two neighbours of the golden files.
func TestGoldenSeesEveryOrder(t *testing.T) {
	for _, operation := range operations {
		want := golden(t, operation)
		for i := range len(want) - 1 {
			if want[i] == want[i+1] {
				t.Errorf("%s: lines %d and %d are the same, their order cannot be seen", operation, i+1, i+2)
			}
			got := slices.Clone(want)
			got[i], got[i+1] = got[i+1], got[i]
			if diffLines(want, got) == "" {
				t.Errorf("%s: lines %d and %d may change places", operation, i+1, i+2)
			}
		}
	}
}

// TestNormalise holds the forms that strace's lines take.
func TestNormalise(t *testing.T) {
	const output = `12  mkdirat(AT_FDCWD</r>, "/d/root/snapshots/new-77", 0700) = 0
12  renameat(AT_FDCWD</r>, "/d/root/snapshots/new-77", AT_FDCWD</r>, "/d/root/snapshots/7") = 0
12  openat(AT_FDCWD</r>, "/d/root/snapshots/7", O_RDONLY|O_NOFOLLOW|O_CLOEXEC|O_DIRECTORY) = 13</d/root/snapshots/7>
13  --- SIGURG {si_signo=SIGURG, si_code=SI_TKILL, si_pid=55, si_uid=0} ---
12  syncfs(13</d/root/snapshots/7> <unfinished ...>
13  openat(AT_FDCWD</r>, "/d/root/snapshots/none", O_RDONLY|O_NOFOLLOW|O_CLOEXEC) = -1 ENOENT (No such file or directory)
13  write(2</r/log>, "a (line), <odd> \"x\"\n", 20) = 20
12  <... syncfs resumed>) = 0
13  sync_file_range(16</d/root/snapshots/7/fs/file>, 0, 0, SYNC_FILE_RANGE_WRITE) = 0
12  sync_file_range(17</d/root/snapshots/7/seal>, 0, 0, SYNC_FILE_RANGE_WAIT_BEFORE|SYNC_FILE_RANGE_WRITE|SYNC_FILE_RANGE_WAIT_AFTER) = 0
12  pwrite64(8</d/root/metadata.db>, "\x05\x00", 4096, 20480) = 4096
12  pwrite64(8</d/root/metadata.db>, "\x06\x00"..., 4096, 24576) = 4096
12  pwrite64(8</d/root/metadata.db>, "\x00\x00"..., 4096, 4096) = 4096
13  write(11<socket:[308063]>, "\x00\x00\x08\x06\x01\x00\x00\x00\x00\x02\x04\x10\x10\x09\x0e\x07\x07", 17) = 17
13  write(11<socket:[308063]>, "\x00\x00\x02\x01\x04\x00\x00\x00\x03\x88\xc0\x00\x00\x02\x01\x05\x00\x00\x00\x03\xbf\xbe", 22) = 22
13  unlinkat(15</d/root/removing/3.f17/fs>, "symlink", 0) = 0
13  unlinkat(13</d/root/removing>, "3.f17", AT_REMOVEDIR) = 0
13  openat(AT_FDCWD</r>, "/d/root/snapshots/2/record.new", O_WRONLY|O_CREAT|O_TRUNC|O_CLOEXEC, 0600) = 14</d/root/snapshots/2/record.new>
13  +++ exited with 0 +++
14  read(8</d/root/metadata.db>,  <detached ...>
12  fsync(8</d/root/meta`
	want := []string{
		"mkdir snapshots/new-*",
		"rename snapshots/new-* -> snapshots/<id>",
		"open snapshots/<id>",
		"syncfs snapshots/<id>",
		"sync_file_range snapshots/<id>/seal",
		"pwrite metadata.db pages",
		"pwrite metadata.db meta",
		"reply",
		"delete removing/<id>.*",
		"create snapshots/<id>/record.new",
	}
	if d := diffLines(want, slices.CompactFunc(must[[]string](t)(normalise(output, "/d/root")), repeats)); d != "" {
		t.Error(d)
	}
	if lines, err := normalise("12  what is this\n", "/d/root"); err == nil {
		t.Errorf("a line that is no call became %q", lines)
	}
}
