package commit

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// A trace is what the kernel saw of a daemon, in lines that do not change from
// one run to the next:
//
//	mkdir snapshots/new-*           open snapshots/<id>        (a cursor)
//	rename A -> B                   create snapshots/<id>/record
//	write snapshots/<id>/record     fsync, fdatasync, syncfs   (of the path behind the descriptor)
//	pwrite metadata.db pages        pwrite metadata.db meta    (one line for a run of them)
//	delete removing/<id>.*          (the whole tree)           reply
//
// Only paths below the root appear, and only what creates, changes or syncs.
type trace struct {
	root string // of the daemon
	file string // strace's output
	read int    // lines that take has returned
}

var tracedCalls = []string{
	"mkdir", "mkdirat", "rename", "renameat", "renameat2", "fsync", "fdatasync", "syncfs", "sync_file_range", "msync",
	"open", "openat", "write", "writev", "pwrite64", "pwritev", "sendmsg", "ftruncate", "link", "linkat", "symlinkat", "unlink", "unlinkat", "rmdir",
}

// strace returns the wrapper that makes a daemon write its trace to file. -D
// keeps the daemon, and not strace, the child that is stopped and killed.
func strace(file string) []string {
	return []string{"strace", "-D", "-f", "--seccomp-bpf", "-y", "-x", "-s", "4096", "-o", file, "-e", "trace=" + strings.Join(tracedCalls, ",")}
}

// take returns the lines of the call that was just answered. strace may write its
// last one, the reply, after the receiver has gone on: take waits for it.
func (tr *trace) take(t *testing.T) []string {
	t.Helper()
	var lines []string
	var end int
	waitFor(t, 20*time.Second, func() error {
		all, err := normalise(string(must[[]byte](t)(os.ReadFile(tr.file))), tr.root)
		if err != nil {
			t.Fatal(err)
		}
		lines, end = all[tr.read:], len(all)
		// An answer may be several writes: the last ones of the call before may not have been on record in time.
		for len(lines) > 1 && lines[0] == "reply" {
			lines = lines[1:]
		}
		if !slices.Contains(lines, "reply") {
			return fmt.Errorf("no reply in the trace:\n%s", strings.Join(lines, "\n"))
		}
		return nil
	})
	tr.read = end
	return slices.CompactFunc(slices.Clone(lines), repeats)
}

var (
	lineForm    = regexp.MustCompile(`^(\d+) +(.*)$`)
	resumedForm = regexp.MustCompile(`^<\.\.\. \w+ resumed>,? ?(.*)$`)
	callForm    = regexp.MustCompile(`^(\w+)\((.*)\) += (.*)$`)
)

// normalise turns strace's output into lines. A call stands where it ended:
// what a sync covers is what had ended before it began, and only one call at a
// time is traced here.
func normalise(output, root string) ([]string, error) {
	var lines []string
	unfinished := map[string]string{} // by thread
	for raw := range strings.Lines(output) {
		if !strings.HasSuffix(raw, "\n") {
			break // strace has not written the rest yet
		}
		m := lineForm.FindStringSubmatch(strings.TrimSuffix(raw, "\n"))
		if m == nil {
			return nil, fmt.Errorf("strace: line without a thread: %q", raw)
		}
		thread, text := m[1], m[2]
		if strings.HasPrefix(text, "---") || strings.HasPrefix(text, "+++") {
			continue // a signal, an end
		}
		if strings.HasSuffix(text, "<detached ...>") {
			continue // the trace ends before the call does
		}
		if head, ok := strings.CutSuffix(text, " <unfinished ...>"); ok {
			unfinished[thread] = head
			continue
		}
		if m := resumedForm.FindStringSubmatch(text); m != nil {
			text = unfinished[thread] + m[1]
			delete(unfinished, thread)
		}
		m = callForm.FindStringSubmatch(text)
		if m == nil {
			return nil, fmt.Errorf("strace: line that is no call: %q", text)
		}
		// -1 ENOENT …: nothing has happened. A ? stands for the answer to a
		// process that was killed meanwhile.
		if strings.HasPrefix(m[3], "-") || strings.HasPrefix(m[3], "?") {
			continue
		}
		line, err := call{name: m[1], args: arguments(m[2]), root: root}.line()
		if err != nil {
			return nil, fmt.Errorf("strace: %q: %w", text, err)
		}
		if line != "" {
			lines = append(lines, line)
		}
	}
	return lines, nil
}

// repeats reports whether a line only repeats what stands before it: one more
// page of a transaction, or entry of a tree.
func repeats(before, line string) bool {
	what, _, _ := strings.Cut(line, " ")
	return before == line && slices.Contains([]string{"pwrite", "write", "delete"}, what)
}

// arguments splits at the commas outside of quotes, brackets and braces.
func arguments(s string) []string {
	var args []string
	depth, quoted, from := 0, false, 0
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case quoted:
		case strings.IndexByte("<[{", c) >= 0:
			depth++
		case strings.IndexByte(">]}", c) >= 0:
			depth--
		case c == ',' && depth == 0:
			args = append(args, s[from:i])
			from = i + 2
		}
	}
	return append(args, s[min(from, len(s)):])
}

// call is one system call as strace prints it.
type call struct {
	name string
	args []string
	root string
}

// line returns the normalised line, or nothing for a call that does not count.
func (c call) line() (string, error) {
	switch c.name {
	case "write", "writev", "sendmsg", "pwrite64", "pwritev":
		return c.write()
	case "open", "openat":
		return c.open()
	case "sync_file_range":
		if c.args[len(c.args)-1] == "SYNC_FILE_RANGE_WRITE" {
			return "", nil // begins to write, waits for nothing: package writeback does it at any time
		}
		fallthrough
	case "fsync", "fdatasync", "syncfs", "ftruncate", "msync":
		return c.about(c.name, behind(c.args[0])), nil
	case "mkdir":
		return c.about("mkdir", c.path("", c.args[0])), nil
	case "mkdirat":
		return c.about("mkdir", c.path(c.args[0], c.args[1])), nil
	case "rename", "link":
		return c.move(c.path("", c.args[0]), c.path("", c.args[1])), nil
	case "renameat", "renameat2", "linkat":
		return c.move(c.path(c.args[0], c.args[1]), c.path(c.args[2], c.args[3])), nil
	case "symlinkat":
		return c.about("symlink", c.path(c.args[1], c.args[2])), nil
	case "unlink", "rmdir":
		return c.delete(c.path("", c.args[0])), nil
	case "unlinkat":
		return c.delete(c.path(c.args[0], c.args[1])), nil
	}
	return "", fmt.Errorf("a system call that was not requested")
}

func (c call) open() (string, error) {
	flags, dir, name := c.args[len(c.args)-1], "", c.args[0]
	if c.name == "openat" {
		dir, name, flags = c.args[0], c.args[1], c.args[2]
	}
	path := c.path(dir, name)
	switch {
	case strings.Contains(flags, "O_CREAT"):
		return c.about("create", path), nil
	case strings.Contains(flags, "O_NOATIME"):
		return "", nil // a walk reads the directories of a layer
	case strings.Contains(flags, "O_NOFOLLOW") && strings.HasPrefix(path, filepath.Join(c.root, "snapshots")):
		return c.about("open", path), nil
	}
	return "", nil // for reading, or for a sync that has its own line
}

func (c call) write() (string, error) {
	path := behind(c.args[0])
	if strings.HasPrefix(path, "socket:") {
		data, err := strconv.Unquote(strings.TrimSuffix(c.args[1], "..."))
		if err != nil {
			return "", err
		}
		if answers(data) {
			return "reply", nil
		}
		return "", nil
	}
	if c.name != "pwrite64" || filepath.Base(path) != "metadata.db" {
		return c.about("write", path), nil
	}
	// bbolt has two pages of 4 KiB that name the root of the tree, and writes
	// them in turn (go.etcd.io/bbolt, tx.go, writeMeta).
	what := " pages"
	if offset := c.args[3]; offset == "0" || offset == "4096" {
		what = " meta"
	}
	return c.about("pwrite", path) + what, nil
}

// answers reports whether HTTP/2 frames hold a HEADERS frame that ends its stream
// (RFC 9113, 4.1 and 6.2): the last frame of an answer, and no ping, window or
// setting.
func answers(data string) bool {
	for len(data) >= 9 {
		length := int(data[0])<<16 | int(data[1])<<8 | int(data[2])
		const headers, endStream = 0x1, 0x1
		if data[3] == headers && data[4]&endStream != 0 {
			return true
		}
		data = data[min(9+length, len(data)):]
	}
	return false
}

// behind returns the path of a descriptor, which -y prints as 7</path>.
func behind(fd string) string {
	_, path, _ := strings.Cut(fd, "<")
	return strings.TrimSuffix(strings.TrimSuffix(path, ">"), "(deleted)")
}

func (c call) path(dir, quoted string) string {
	name, err := strconv.Unquote(quoted)
	if err != nil {
		return quoted
	}
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(behind(dir), name)
}

func (c call) about(what, path string) string {
	if name := c.below(path); name != "" {
		return what + " " + name
	}
	return ""
}

func (c call) move(from, to string) string {
	a, b := c.below(from), c.below(to)
	if a == "" && b == "" {
		return ""
	}
	return strings.TrimSuffix(c.name, "at") + " " + a + " -> " + b
}

// delete names the tree, not the entry: in which order a directory lists its
// entries differs from disk to disk.
func (c call) delete(path string) string {
	name := c.below(path)
	if top, rest, ok := strings.Cut(name, "/"); ok && top == "removing" {
		tree, _, _ := strings.Cut(rest, "/")
		return "delete removing/" + tree
	}
	return c.about("delete", path)
}

var variable = []struct {
	form *regexp.Regexp
	as   string
}{
	{regexp.MustCompile(`^snapshots/\d+`), "snapshots/<id>"},
	{regexp.MustCompile(`^snapshots/new-\d+`), "snapshots/new-*"},
	{regexp.MustCompile(`^removing/\d+\.[0-9a-f]+`), "removing/<id>.*"},
}

// below is a path below the root without what changes from run to run, and
// empty for one elsewhere.
func (c call) below(path string) string {
	name, ok := strings.CutPrefix(path, c.root+"/")
	if !ok {
		return ""
	}
	for _, v := range variable {
		name = v.form.ReplaceAllString(name, v.as)
	}
	return name
}

// traced starts a daemon under strace.
func traced(t *testing.T, o kit.DaemonOptions) (*kit.Daemon, *trace) {
	t.Helper()
	tr := &trace{file: filepath.Join(t.TempDir(), "strace.out")}
	o.Wrapper = strace(tr.file)
	d := newDaemon(t, o)
	tr.root = d.Root
	return d, tr
}

// diffLines shows where two lists differ; empty when they do not.
func diffLines(want, got []string) string {
	if slices.Equal(want, got) {
		return ""
	}
	i := 0
	for i < min(len(want), len(got)) && want[i] == got[i] {
		i++
	}
	return fmt.Sprintf("from line %d on, want\n\t%s\ngot\n\t%s", i+1, strings.Join(want[i:], "\n\t"), strings.Join(got[i:], "\n\t"))
}
