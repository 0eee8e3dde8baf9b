package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// observation is the state of one half after the power cut.
type observation struct {
	files              int  // of the layers
	whole, empty, gone int  // of these files: unchanged, without content, without a name
	note               bool // what the container had synced is there

	// containerd's words
	status, unpacked string

	// of a container: at once, after another pull, and after its layers were
	// deleted by hand
	run, again, deleted outcome
}

// outcome is how an attempt to run a container ended.
type outcome struct {
	ok   bool
	text string
}

// count compares the layers with what they were before the cut.
func (o *observation) count(before, after kit.Tree) {
	o.files, o.whole, o.empty, o.gone = len(before), 0, 0, 0
	for path, was := range before {
		is, ok := after[path]
		switch {
		case !ok:
			o.gone++
		case is == was:
			o.whole++
		case is.Size == 0:
			o.empty++
		}
	}
}

// reportedWhole reports whether containerd calls the image complete and unpacked.
func (o observation) reportedWhole() bool {
	return strings.HasPrefix(o.status, "complete") && o.unpacked == "true"
}

// verdict is nil when both halves came out as the demonstration claims. dirty is
// the time between the pull with overlayfs and the cut.
func verdict(overlayfs, durable observation, dirty time.Duration) error {
	var errs []error
	expect := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	expect(durable.files > 0 && durable.whole == durable.files, "durable: %d of %d layer files are whole: acknowledged layers were lost", durable.whole, durable.files)
	expect(durable.note, "durable: the note that the container had synced is lost")
	expect(durable.reportedWhole(), "durable: containerd reports %s, unpacked %s", durable.status, durable.unpacked)
	expect(durable.run.ok, "durable: the container %s", durable.run.text)
	expect(durable.again.ok, "durable: after pulling again the container %s", durable.again.text)

	expect(durable.deleted.ok, "durable: with its layers deleted the container %s", durable.deleted.text)

	expect(overlayfs.files > 0 && overlayfs.whole < overlayfs.files,
		"overlayfs: all %d layer files survived a cut %.1f s after the pull began; the kernel may have written them early (vm.dirty_expire_centisecs is %s, vm.dirty_background_ratio %s)",
		overlayfs.files, dirty.Seconds(), sysctl("dirty_expire_centisecs"), sysctl("dirty_background_ratio"))
	expect(overlayfs.reportedWhole(), "overlayfs: containerd reports %s, unpacked %s: it does not hide the loss", overlayfs.status, overlayfs.unpacked)
	expect(!overlayfs.run.ok, "overlayfs: the container %s", overlayfs.run.text)
	expect(!overlayfs.again.ok, "overlayfs: after pulling again the container %s", overlayfs.again.text)
	expect(!overlayfs.deleted.ok, "overlayfs: with its layers deleted the container %s", overlayfs.deleted.text)
	return errors.Join(errs...)
}

func sysctl(name string) string {
	b, err := os.ReadFile("/proc/sys/vm/" + name)
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(b))
}

// printTable puts the halves side by side.
func printTable(w io.Writer, overlayfs, durable observation) {
	row := func(what string, cell func(observation) string) {
		fmt.Fprintf(w, "  %-30s  %-33s  %s\n", what, cell(overlayfs), cell(durable))
	}
	fmt.Fprintf(w, "  %-30s  %-33s  %s\n", "", "overlayfs", "durable")
	fmt.Fprintf(w, "  %s\n", strings.Repeat("-", 85))
	fmt.Fprintln(w, "  what containerd reports")
	row("  image check: status", func(o observation) string { return o.status })
	row("  image check: unpacked", func(o observation) string { return o.unpacked })
	fmt.Fprintln(w, "  what is")
	row("  files of the layers", func(o observation) string { return fmt.Sprintf("%d of %d whole", o.whole, o.files) })
	row("  the note that was synced", func(o observation) string { return map[bool]string{true: "kept", false: "lost"}[o.note] })
	row("  a container", func(o observation) string { return o.run.text })
	row("  a container after a new pull", func(o observation) string { return o.again.text })
	row("  a container, layers deleted", func(o observation) string { return o.deleted.text })
}

func step(n int, what string) { fmt.Printf("  %d  %s\n", n, what) }

func detail(format string, args ...any) { fmt.Printf("     "+format+"\n", args...) }

// result is what came out of the command shown before.
func result(format string, args ...any) { fmt.Printf("               -> "+format+"\n", args...) }

// lastLine is what ctr itself printed, without the command line and the logs
// before it.
func lastLine(err error) string {
	lines := strings.Split(strings.TrimSpace(err.Error()), "\n")
	return lines[len(lines)-1]
}

// cause is the innermost part of an error that came as text.
func cause(err error) string {
	line := lastLine(err)
	return strings.TrimSpace(line[strings.LastIndex(line, ": ")+1:])
}
