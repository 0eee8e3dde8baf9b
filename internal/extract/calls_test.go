package extract

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
)

// extractHere has the test binary extract the tar on its standard input, into this
// directory.
const extractHere = "EXTRACT_INTO"

// TestSystemCalls: an entry takes at most 8 system calls, those of the stages for each other
// included. containerd's applier takes 31. Not counted is nanosleep(2): the Go runtime's
// monitor sleeps as long as the process runs, and strace makes that long.
func TestSystemCalls(t *testing.T) {
	if dir := os.Getenv(extractHere); dir != "" {
		_, err := Apply(t.Context(), Options{Dir: dir, Tar: os.Stdin})
		treetest.Check(t, err)
		return
	}
	root(t)
	if _, err := exec.LookPath("strace"); err != nil {
		t.Skip("strace is not installed")
	}
	// The tree of a package: mostly small files, some directories and links.
	const n = 4000
	var items []item
	for i := range n {
		switch dir := fmt.Sprintf("usr/share/doc/package%d", i/12); i % 12 {
		case 0:
			items = append(items, dirItem(dir, 0o755))
		case 1:
			items = append(items, symlinkItem(dir+"/link", "file"))
		default:
			items = append(items, fileItem(fmt.Sprintf("%s/file%d", dir, i), strings.Repeat("x", 100*(i%300))))
		}
	}
	self, err := os.Executable()
	treetest.Check(t, err)
	calls := func(layer []byte) int {
		out := filepath.Join(t.TempDir(), "calls")
		cmd := exec.Command("strace", "-f", "-c", "-o", out, self, "-test.run=^TestSystemCalls$")
		cmd.Env = append(os.Environ(), extractHere+"="+t.TempDir())
		cmd.Stdin = bytes.NewReader(layer)
		if text, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		table, err := os.ReadFile(out)
		treetest.Check(t, err)
		t.Logf("%s", table)
		sum := 0
		for _, row := range regexp.MustCompile(`(?m)^ *[\d.]+ +[\d.]+ +\d+ +(\d+) +\d* +(\w+)$`).FindAllSubmatch(table, -1) {
			if name := string(row[2]); name != "total" && name != "nanosleep" {
				n, err := strconv.Atoi(string(row[1]))
				treetest.Check(t, err)
				sum += n
			}
		}
		if sum == 0 {
			t.Fatal("strace has counted nothing")
		}
		return sum
	}
	each := float64(calls(tarOf(t, items...))-calls(tarOf(t))) / n
	t.Logf("%.1f system calls for each of %d entries", each, n)
	if each > 8 {
		t.Errorf("%.1f system calls for an entry, at most 8", each)
	}
}
