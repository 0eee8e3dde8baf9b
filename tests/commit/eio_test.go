package commit

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/defects"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// diskKind is a kind of failure of a disk.
type diskKind struct {
	name  string
	fault disk.Fault
	step  int   // between one k and the next
	times []int // how often it strikes; 0: from then on for ever
}

// kinds returns the kinds of requests that fail with an I/O error, and then other
// ways for a write to fail: a disk that is thinly provisioned and has no more
// space, and one that tears a page.
func (a *ailing) kinds() []diskKind {
	// A file is many requests, all of them alike. So are the blocks of btrfs' trees, of
	// which a commit writes more than a hundred, with a flush for each of its many syncs.
	files, trees, flushes, others := 8, 3, 3, 12
	if a.fs == disk.Btrfs {
		trees, flushes, others = 12, 5, 12
	}
	if kittest.Every() {
		files, trees, flushes, others = 1, 1, 1, 1
	}
	both := []int{0, 1}
	kinds := []diskKind{
		{"data", disk.Fault{Op: disk.OpWrite, Ranges: a.data, Errno: syscall.EIO}, files, both},
		{"journal", disk.Fault{Op: disk.OpWrite, Ranges: a.journal, Errno: syscall.EIO}, trees, both},
		{"flush", disk.Fault{Op: disk.OpFlush, Errno: syscall.EIO}, flushes, both},
		{"no space for data", disk.Fault{Op: disk.OpWrite, Ranges: a.data, Errno: syscall.ENOSPC}, others, []int{1}},
		{"torn data", disk.Fault{Op: disk.OpWrite, Ranges: a.data, Errno: syscall.EIO, Short: 512}, others, []int{1}},
	}
	if a.fs != disk.Btrfs { // it does not mount when its superblock is torn
		kinds = append(kinds, diskKind{"torn journal", disk.Fault{Op: disk.OpWrite, Ranges: a.journal, Errno: syscall.EIO, Short: 512}, others, []int{1}})
	}
	return kinds
}

// sweep lets the k-th request of a kind fail, k growing, until it is never
// reached or something is wrong. A fault strikes once, or from then on for ever.
func (a *ailing) sweep(t *testing.T, want []kit.Tree, kind diskKind, times int) (wrong []string) {
	t.Helper()
	begin, passes, failed := time.Now(), 0, 0
	step := kind.step
	if times == 0 && !kittest.Every() {
		step *= 3 // what comes after the first is the same for each
	}
	for k := 0; ; k += step {
		f := kind.fault
		f.Skip, f.Times = k, times
		p := newPass(a, want)
		hits := p.run(t, f)
		passes++
		if p.failed {
			failed++
		}
		if len(p.wrong) > 0 {
			return append([]string{fmt.Sprintf("%s, %s:", a.fs, f)}, p.wrong...)
		}
		if hits == 0 {
			break
		}
	}
	t.Logf("%d passes, in %d of them a call failed, %v", passes, failed, time.Since(begin).Round(time.Millisecond))
	if failed == 0 {
		return []string{"no call failed in any pass: nothing of the kind was sent to the disk"}
	}
	return nil
}

// TestDiskErrors lets requests of a kind fail, one in each pass, and every third of these
// with all that follow it, until the chain is unpacked without any failing. Whatever fails,
// no acknowledged layer is less than whole after the next boot, nothing that failed is ever
// committed, and the daemon goes on answering.
func TestDiskErrors(t *testing.T) {
	want := reference(t, layers)
	for _, fs := range []disk.FS{disk.Btrfs, disk.Ext4, disk.XFS} {
		t.Run(string(fs), func(t *testing.T) {
			t.Parallel()
			a := newAiling(t, fs, kit.DaemonOptions{})
			for _, kind := range a.kinds() {
				for _, times := range kind.times {
					t.Run(kind.name+[]string{" for ever", " once"}[times], func(t *testing.T) {
						if wrong := a.sweep(t, want, kind, times); len(wrong) > 0 {
							t.Error(strings.Join(wrong, "\n"))
						}
					})
				}
			}
		})
	}
}

// TestDiskErrorsSeeMutants plants mistakes in the handling of errors. A test that
// cannot see them would prove nothing.
func TestDiskErrorsSeeMutants(t *testing.T) {
	want := reference(t, layers)
	for _, mutant := range []string{"error-swallowed", "retry-after-eio", "fd-shared", "no-syncfs"} {
		t.Run(mutant, func(t *testing.T) {
			a := newAiling(t, disk.Ext4, kit.DaemonOptions{Binary: must[string](t)(defective()), Env: []string{defects.Activate(mutant)}})
			wrong := a.sweep(t, want, a.kinds()[0], 1)
			if len(wrong) == 0 {
				t.Error("not seen")
			}
			t.Logf("seen: %.300s", strings.Join(wrong, "\n"))
		})
	}
}
