package doctor

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
)

func (f *Facts) warning(about ...string) (found []fsync.Warning) {
	for _, w := range f.Host.Warnings {
		if slices.Contains(about, w.About) {
			found = append(found, w)
		}
	}
	return found
}

func kernel(f *Facts) (found []Finding) {
	for _, w := range f.warning(fsync.AboutKernel) {
		found = append(found, warn(w.Problem, w.Cure)...)
	}
	if !f.Host.Overlay {
		found = append(found, warn("/proc/filesystems does not list overlay: the kernel lacks it, or the module is not loaded", "modprobe overlay")...)
	}
	return orOK(found, "Linux "+f.Host.Kernel+", with overlayfs")
}

func filesystem(f *Facts) (found []Finding) {
	if f.Host.FSErr != nil {
		return fail(f.Host.FSErr.Error(), "")
	}
	for _, w := range f.warning(fsync.AboutType) {
		found = append(found, warn(w.Problem, w.Cure)...)
	}
	return orOK(found, f.Root+" is on a file system that this snapshotter supports")
}

func journal(f *Facts) (found []Finding) {
	if f.Host.FSErr != nil {
		return unknown("the file system of the root is not suitable, or not there")
	}
	for _, w := range f.warning(fsync.AboutData, fsync.AboutUnknown) {
		found = append(found, warn(w.Problem, w.Cure)...)
	}
	for _, w := range f.warning(fsync.AboutNoJournal, fsync.AboutBarrier) {
		found = append(found, fail(w.Problem, w.Cure)...)
	}
	return orOK(found, "the mount options keep the order of writes")
}

// Disk is the block device of the root.
type Disk struct {
	Name      string // "" when the file system has none of its own, such as btrfs
	Cache     string // queue/write_cache: "write back", "write through", or "" when it is not known
	Removable bool
}

func disk(f *Facts) []Finding {
	d := f.Host.Disk
	switch {
	case d.Name == "":
		return unknown("the block device of the root is not known")
	case d.Removable || strings.HasPrefix(d.Name, "mmcblk"):
		return warn(fmt.Sprintf("the root is on %s, a removable disk or a card: many acknowledge a flush that they have not done", d.Name), "")
	case d.Cache == "write back":
		return ok(d.Name + " has a cache for writes, which every sync flushes")
	case d.Cache == "write through":
		return ok(d.Name + " has no volatile cache for writes")
	}
	return unknown("the kernel does not report whether " + d.Name + " has a cache for writes")
}

// slowSync is how long a sync may take. containerd's metadata is locked meanwhile.
const slowSync = 5 * time.Second

func syncing(f *Facts) []Finding {
	dirty := fmt.Sprintf("%d MiB were dirty", f.Host.Dirty>>20)
	switch {
	case f.Host.FSErr != nil:
		return unknown("the file system of the root is not suitable, or not there")
	case f.Host.SyncErr != nil:
		return fail(fmt.Sprintf("syncfs of %s: %v", f.Root, f.Host.SyncErr), "find what the kernel log has about the disk, and replace it")
	case f.Host.Sync > slowSync:
		return warn(fmt.Sprintf("a sync of the root took %v; %s", f.Host.Sync.Round(time.Millisecond), dirty), "")
	}
	return ok(fmt.Sprintf("a sync of the root took %v; %s", f.Host.Sync.Round(time.Millisecond), dirty))
}

func neighbors(f *Facts) []Finding {
	if len(f.Host.Sharing) > 0 {
		return warn("on the file system of the root is also "+strings.Join(f.Host.Sharing, ", ")+": each Commit syncs its data, too, and each waits for the other", "")
	}
	return ok("no database that is known here shares the file system of the root")
}

// Space is what statfs(2) reports.
type Space struct {
	Size, Avail, Files, FilesFree uint64 // bytes and inodes; Files is 0 where their number is not fixed
}

func space(f *Facts) []Finding {
	s := f.Host.Space
	if s.Size == 0 {
		return unknown("the size of the file system of the root is not known")
	}
	bytes := 100 * float64(s.Avail) / float64(s.Size)
	text := fmt.Sprintf("%.0f %% of %.1f GiB are free", bytes, float64(s.Size)/(1<<30))
	inodes := 100.0
	if s.Files > 0 {
		inodes = 100 * float64(s.FilesFree) / float64(s.Files)
		text += fmt.Sprintf(", and %.0f %% of the inodes", inodes)
	}
	switch {
	case bytes < 3 || inodes < 1:
		return fail(text+": pulls fail, or soon will", "")
	case bytes < 15:
		return warn(text+"; below 15 % the kubelet removes images and evicts pods", "")
	case inodes < 5:
		return warn(text+"; below 5 % the kubelet evicts pods", "")
	}
	return ok(text)
}

// clockSlack is how far clocks of one boot may be apart.
const clockSlack = time.Minute

func clock(f *Facts) []Finding {
	var latest time.Time
	for _, e := range slices.Concat(f.Report.Journal.Committed, f.Report.Journal.History) {
		if e.Time.After(latest) {
			latest = e.Time
		}
	}
	if s := f.Report.Journal.Run.Started; s.After(latest) {
		latest = s
	}
	switch {
	case latest.IsZero():
		return ok("the journal is empty")
	case latest.After(f.Now.Add(clockSlack)):
		return warn(fmt.Sprintf("the clock is at %s, and the journal has an entry of %s", f.Now.UTC().Format(time.RFC3339), latest.UTC().Format(time.RFC3339)), "")
	}
	return ok("the clock is after the latest entry of the journal")
}

func selinux(f *Facts) []Finding {
	label := f.Host.Label
	switch {
	case !f.Host.SELinux:
		return ok("SELinux does not enforce anything here")
	case label == "":
		return unknown("the label of the root cannot be read")
	case !strings.Contains(label, ":container_"):
		return warn(fmt.Sprintf("the root has the label %q", label), "")
	}
	return ok(fmt.Sprintf("the root has the label %q", label))
}
