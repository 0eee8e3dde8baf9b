package commit

import (
	"archive/tar"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// TestFilesAlone: with sync = "files" an extraction of our differ and its Commit sync the
// file system nowhere on ext4 and xfs, also when the parent becomes known in Commit and
// changes something. With "syncfs", and on btrfs, they do.
func TestFilesAlone(t *testing.T) {
	for _, c := range []struct {
		fs, sync string
		alone    bool
	}{{"ext4", "files", true}, {"xfs", "files", true}, {"btrfs", "files", false}, {"ext4", "syncfs", false}} {
		t.Run(c.fs+"/"+c.sync, func(t *testing.T) {
			disk := newDisk(t, kit.DiskOptions{FS: c.fs, Size: 512 << 20})
			a := newApplier(t, kit.DaemonOptions{Dir: disk.Path("durable"), Config: "[diff]\nsync = '" + c.sync + "'\n"})
			links := chain(2, "")
			lower, upper := links[0], links[1]
			a.apply(t, lower, "", a.blob(t, entry("dir/", ""), entry("dir/low", "x")))
			seen := a.take(t)
			check(t, lower.commit(t.Context(), a.sn))
			seen = append(seen, a.take(t)...)

			upper.parentName = ""
			a.apply(t, upper, lower.chainID, a.blob(t, entry("dir/high", "y")))
			seen = append(seen, a.take(t)...)
			check(t, a.sn.Commit(t.Context(), upper.name, upper.key, upper.labels(), snapshots.WithParent(lower.name)))
			seen = append(seen, a.take(t)...)

			for prefix, want := range map[string]bool{"syncfs snapshots/<id>": !c.alone, "sync_file_range": c.alone} {
				if slices.ContainsFunc(seen, func(line string) bool { return strings.HasPrefix(line, prefix) }) != want {
					t.Errorf("%s: want %v in\n%s", prefix, want, strings.Join(seen, "\n"))
				}
			}
			check(t, a.daemon.Stop())
		})
	}
}

func entry(name, content string) tarEntry {
	kind, mode := byte(tar.TypeReg), int64(0o644)
	if strings.HasSuffix(name, "/") {
		kind, mode = tar.TypeDir, 0o755
	}
	return tarEntry{tar.Header{Typeflag: kind, Name: name, Mode: mode, Size: int64(len(content))}, content}
}

// TestOneJournal: files are synced alone only where one fsync is one of everything before, and on ext4 only, what is
// overwritten is durable after the next sync.
func TestOneJournal(t *testing.T) {
	for name, c := range map[string]struct {
		opts kit.DiskOptions
		want bool
	}{
		"ext4":                {kit.DiskOptions{FS: "ext4"}, true},
		"ext4 fast_commit":    {kit.DiskOptions{FS: "ext4", Mkfs: []string{"-O", "fast_commit"}}, false},
		"ext4 data=writeback": {kit.DiskOptions{FS: "ext4", Mount: "data=writeback"}, false},
		"ext4 no journal":     {kit.DiskOptions{FS: "ext4", Mkfs: []string{"-O", "^has_journal"}}, false},
		"xfs":                 {kit.DiskOptions{FS: "xfs"}, true},
		"btrfs":               {kit.DiskOptions{FS: "btrfs"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			c.opts.Size = 512 << 20
			disk := newDisk(t, c.opts)
			if got := fsync.OneJournal(disk.Path()); got != c.want {
				t.Error(got)
			}
			if got := fsync.InPlace(disk.Path(), disk.Path("lost+found/..")); got != (c.want && c.opts.FS == "ext4") {
				t.Errorf("in place: %v", got)
			}
			if fsync.InPlace(disk.Path(), "/") {
				t.Error("in place, with another file system")
			}
		})
	}
}
