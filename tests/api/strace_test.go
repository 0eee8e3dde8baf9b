package api

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// checkSealed finds the life of one layer in a trace of the daemon and
// returns what is wrong with its order, or nil. The order that promise I1 rests
// on is
//
//	Prepare requested … open the file system … Prepare answered
//	(containerd extracts the layer)
//	Commit requested … syncfs on that descriptor … metadata.db written, fdatasync … Commit answered
//
// The descriptor has to be older than the first write to the layer: syncfs
// reports only the write errors that came after its descriptor was opened.
func checkSealed(calls []tracedCall, chain string) error {
	prepare, commit, err := lifeOf(calls, chain)
	if err != nil {
		return err
	}
	written, err := sealingWrite(calls, chain, commit)
	if err != nil {
		return err
	}
	if err := checkFdatasync(calls, written, commit); err != nil {
		return err
	}
	var reasons []string
	for _, c := range calls {
		if c.name != "syncfs" || c.start < commit.requested || c.end > written {
			continue
		}
		opened := openedAt(calls, c)
		switch {
		case !c.ok():
			reasons = append(reasons, fmt.Sprintf("syncfs(%s) at line %d: %s", c.fd, c.start, c.result))
		case opened < prepare.requested || opened > prepare.answered:
			reasons = append(reasons, fmt.Sprintf("syncfs(%s) at line %d: opened at line %d, not within Prepare (lines %d to %d)", c.fd, c.start, opened, prepare.requested, prepare.answered))
		default:
			return nil
		}
	}
	return fmt.Errorf("no syncfs on a descriptor of Prepare between the Commit request (line %d) and the metadata.db transaction (line %d): %s", commit.requested, written, strings.Join(reasons, "; "))
}

// lifeOf finds the calls that made the layer. Both carry the key "extract-…
// CHAIN", and Commit the name "…/CHAIN" too. Prepare comes first.
func lifeOf(calls []tracedCall, chain string) (prepare, commit *rpc, err error) {
	key := regexp.MustCompile(`extract-\S+ ` + chain)
	name := regexp.MustCompile(`/\d+/` + chain)
	for _, r := range rpcs(calls) {
		switch {
		case !key.MatchString(r.request):
		case name.MatchString(r.request):
			commit = r
		case prepare == nil:
			prepare = r
		}
	}
	if prepare == nil || commit == nil {
		return nil, nil, fmt.Errorf("no Prepare (%v) or no Commit (%v) of %s in the trace", prepare != nil, commit != nil, chain)
	}
	if prepare.answered == 0 || commit.answered == 0 {
		return nil, nil, fmt.Errorf("Prepare or Commit of %s was not answered", chain)
	}
	return prepare, commit, nil
}

// sealingWrite finds where the committed name is first written to metadata.db.
func sealingWrite(calls []tracedCall, chain string, commit *rpc) (line int, err error) {
	name := regexp.MustCompile(`/\d+/` + chain)
	for _, c := range calls {
		if c.name == "pwrite64" && filepath.Base(c.path()) == "metadata.db" && name.Match(c.data) {
			if c.start < commit.requested {
				return 0, fmt.Errorf("metadata.db names %s at line %d, before its Commit was requested at line %d", chain, c.start, commit.requested)
			}
			return c.start, nil
		}
	}
	return 0, fmt.Errorf("%s is never written to metadata.db", chain)
}

// checkFdatasync wants a successful fdatasync of metadata.db after its last
// write of this Commit and before the answer.
func checkFdatasync(calls []tracedCall, written int, commit *rpc) error {
	synced := false
	for _, c := range calls {
		if c.start < written || c.end > commit.answered || filepath.Base(c.path()) != "metadata.db" {
			continue
		}
		switch c.name {
		case "pwrite64":
			synced = false
		case "fdatasync":
			synced = c.ok()
		}
	}
	if !synced {
		return fmt.Errorf("answered at line %d without a successful fdatasync after the last write to metadata.db", commit.answered)
	}
	return nil
}

// openedAt is the line at which the descriptor that a call uses was opened.
func openedAt(calls []tracedCall, use tracedCall) int {
	opened := 0
	number, _, _ := strings.Cut(use.fd, "<")
	for _, c := range calls {
		if c.start >= use.start {
			break
		}
		switch result, _, _ := strings.Cut(c.result, "<"); c.name {
		case "openat", "openat2", "dup", "dup2", "dup3":
			if c.ok() && result == number {
				opened = c.end
			}
		}
	}
	return opened
}

// TestPullSyncsBeforeItSeals traces the daemon during a pull of three layers.
func TestPullSyncsBeforeItSeals(t *testing.T) {
	trace := filepath.Join(scratch(t), "trace")
	s := newStack(t, kit.NodeOptions{Daemon: kit.DaemonOptions{Wrapper: append([]string{"strace", "-o", trace}, traceFlags...)}})
	img := images.Get(t, "runnable")
	if len(img.ChainIDs) != 3 {
		t.Fatalf("the image has %d layers, want 3", len(img.ChainIDs))
	}
	s.pull(t, "transfer", "durable", img)
	if err := s.Daemon.Stop(); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	calls := parseText(t, string(text))
	without := parseText(t, regexp.MustCompile(`(?m)^.*syncfs.*\n`).ReplaceAllString(string(text), ""))
	for _, chain := range img.ChainIDs {
		if err := checkSealed(calls, chain.String()); err != nil {
			t.Errorf("layer %s: %v", chain, err)
		}
		if checkSealed(without, chain.String()) == nil {
			t.Errorf("layer %s: passes without a syncfs in the trace: the check checks nothing", chain)
		}
	}
	n := 0
	for _, c := range calls {
		if c.name == "syncfs" && c.ok() {
			n++
		}
	}
	t.Logf("%d system calls, %d syncfs for %d layers", len(calls), n, len(img.ChainIDs))
}

// TestCheckSealed shows on small traces, written by hand, which orders pass.
func TestCheckSealed(t *testing.T) {
	const chain = "sha256:0123456789abcdef0123456789abcdef"
	open := `openat(AT_FDCWD<` + x("/") + `>, "` + x("/r/snapshots") + `", O_RDONLY) = 9<` + x("/r/snapshots") + `>`
	reopen := strings.ReplaceAll(open, "9<", "11<")
	sync := `syncfs(9<` + x("/r/snapshots") + `>) = 0`
	prepare := socketCall("read", request(1, "k8s.io/1/extract-5-abcd "+chain))
	prepared := socketCall("write", answer(1, "overlay upperdir=/r/snapshots/1/fs"))
	commit := socketCall("read", request(3, "k8s.io/1/extract-5-abcd "+chain+" k8s.io/2/"+chain))
	answered := socketCall("write", answer(3, ""))
	row := "row k8s.io/2/" + chain
	write := fmt.Sprintf(`pwrite64(7<%s>, "%s", %d, 8192) = %d`, x("/r/metadata.db"), x(row), len(row), len(row))
	flush := `fdatasync(7<` + x("/r/metadata.db") + `>) = 0`

	for _, c := range []struct {
		name  string
		lines []string
		bad   string // part of the complaint, empty when the order is right
	}{
		{"the right order", []string{prepare, open, prepared, commit, sync, write, flush, answered}, ""},
		{"no syncfs", []string{prepare, open, prepared, commit, write, flush, answered}, "no syncfs"},
		{"syncfs before Commit", []string{prepare, open, prepared, sync, commit, write, flush, answered}, "no syncfs"},
		{"syncfs after the transaction", []string{prepare, open, prepared, commit, write, flush, sync, answered}, "no syncfs"},
		{"syncfs after the answer", []string{prepare, open, prepared, commit, write, flush, answered, sync}, "no syncfs"},
		{"syncfs still running when the row is written", []string{prepare, open, prepared, commit, "1 " + strings.Replace(sync, ") = 0", " <unfinished ...>", 1), write, "1 <... syncfs resumed>) = 0", flush, answered}, "no syncfs"},
		{"syncfs interrupted by another thread", []string{prepare, open, prepared, commit, "1 " + strings.Replace(sync, ") = 0", " <unfinished ...>", 1), "2 close(5<" + x("/f") + ">) = 0", "1 <... syncfs resumed>) = 0", write, flush, answered}, ""},
		{"syncfs cut short by the end of the trace", []string{prepare, open, prepared, commit, "2 " + strings.Replace(sync, ") = 0", " <detached ...>", 1), write, flush, answered}, "no syncfs"},
		{"another call cut short by the end of the trace", []string{prepare, open, prepared, commit, sync, write, flush, answered, "2 read(2022670080,  <detached ...>"}, ""},
		{"syncfs fails", []string{prepare, open, prepared, commit, strings.Replace(sync, "= 0", "= -1 EIO (Input/output error)", 1), write, flush, answered}, "EIO"},
		{"descriptor opened late", []string{prepare, prepared, commit, open, sync, write, flush, answered}, "not within Prepare"},
		{"descriptor opened between", []string{prepare, prepared, open, commit, sync, write, flush, answered}, "not within Prepare"},
		{"descriptor opened once and for all", []string{open, prepare, prepared, commit, sync, write, flush, answered}, "not within Prepare"},
		{"descriptor opened again", []string{prepare, open, prepared, "1 close(9<" + x("/r/snapshots") + ">) = 0", open, commit, sync, write, flush, answered}, "not within Prepare"},
		{"syncfs on another descriptor", []string{prepare, open, prepared, reopen, commit, strings.Replace(sync, "9<", "11<", 1), write, flush, answered}, "not within Prepare"},
		{"no fdatasync", []string{prepare, open, prepared, commit, sync, write, answered, flush}, "without a successful fdatasync"},
		{"fdatasync fails", []string{prepare, open, prepared, commit, sync, write, strings.Replace(flush, "= 0", "= -1 EIO (Input/output error)", 1), answered}, "without a successful fdatasync"},
		{"a page written after the last fdatasync", []string{prepare, open, prepared, commit, sync, write, flush, write, answered}, "without a successful fdatasync"},
		{"answered first", []string{prepare, open, prepared, commit, answered, sync, write, flush}, "without a successful fdatasync"},
		{"row written before Commit", []string{prepare, open, prepared, write, flush, commit, sync, answered}, "before its Commit"},
		{"no row", []string{prepare, open, prepared, commit, sync, flush, answered}, "never written"},
		{"no Commit", []string{prepare, open, prepared}, "no Commit"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var text strings.Builder
			for _, line := range c.lines {
				if line[0] < '0' || line[0] > '9' {
					line = "1 " + line
				}
				text.WriteString(line + "\n")
			}
			err := checkSealed(parseText(t, text.String()), chain)
			if c.bad == "" && err != nil {
				t.Error(err)
			}
			if c.bad != "" && (err == nil || !strings.Contains(err.Error(), c.bad)) {
				t.Errorf("complaint is %v, want %q", err, c.bad)
			}
		})
	}
}

// TestParseTraceRefuses feeds the parser what it must not pass over.
func TestParseTraceRefuses(t *testing.T) {
	for _, line := range []string{
		"1 writev(5<" + x("socket:[1]") + `>, [{iov_base="\x00", iov_len=1}], 1) = 1`,
		"1 read(5<" + x("socket:[1]") + `>, "\x00"..., 100) = 100`,
		"1 <... syncfs resumed>) = 0",
		"no such line",
	} {
		if _, err := parseTrace(strings.NewReader(line + "\n")); err == nil {
			t.Errorf("accepted: %s", line)
		}
	}
}

func parseText(t *testing.T, text string) []tracedCall {
	t.Helper()
	calls, err := parseTrace(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return calls
}

// x writes a string as strace -xx does.
func x(s string) string {
	var b strings.Builder
	for i := range len(s) {
		b.WriteString(`\x` + hex.EncodeToString([]byte{s[i]}))
	}
	return b.String()
}

func socketCall(name string, data []byte) string {
	return fmt.Sprintf(`%s(5<%s>, "%s", %d) = %d`, name, x("socket:[99]"), x(string(data)), len(data), len(data))
}

// request and answer are a call's two halves as HTTP/2 frames.
func request(id byte, message string) []byte {
	return bytes.Join([][]byte{frame(http2Headers, 4, id, "headers"), frame(http2Data, endStream, id, message)}, nil)
}

func answer(id byte, message string) []byte {
	return bytes.Join([][]byte{frame(http2Headers, 4, id, "headers"), frame(http2Data, 0, id, message), frame(http2Headers, 4|endStream, id, "trailers")}, nil)
}

func frame(kind, flags, id byte, body string) []byte {
	return append([]byte{0, 0, byte(len(body)), kind, flags, 0, 0, 0, id}, body...)
}
