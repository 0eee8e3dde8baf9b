package defects

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// Clock compiles the daemon with planted defects, of which none is active unless the
// environment activates it, and with a clock that is off by CLOCK_OFFSET seconds.
// A program that is linked statically reads the time from the kernel; only its own
// time.Now can return another.
var Clock = sync.OnceValues(func() (string, error) {
	tests, err := kit.Module()
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp("", "clock")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	replace, err := clockOverlay(filepath.Join(filepath.Dir(tests), "cmd/durable-snapshotter"), dir)
	if err != nil {
		return "", fmt.Errorf("build a daemon with another clock: %w", err)
	}
	return BuildAs(context.Background(), "durable-snapshotter-clock", replace)
})

// clockOverlay writes package time with an offset, and a file of the daemon that sets
// it, into dir. It returns which file replaces which.
func clockOverlay(cmd, dir string) (map[string]string, error) {
	goroot, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return nil, err
	}
	original := filepath.Join(strings.TrimSpace(string(goroot)), "src/time/time.go")
	text, err := os.ReadFile(original)
	if err != nil {
		return nil, err
	}
	// func Now() Time {
	//	sec, nsec, mono := now()
	const head = "func Now() Time {\n"
	before, after, ok := strings.Cut(string(text), head)
	first, rest, ok2 := strings.Cut(after, "\n")
	if !ok || !ok2 || !strings.HasPrefix(strings.TrimSpace(first), "sec, nsec, mono := ") {
		return nil, fmt.Errorf("%s is not as it was: %q", original, first)
	}
	changed := before + "var clockOffset int64\n\n// SetClockOffset is for tests.\nfunc SetClockOffset(s int64) { clockOffset = s }\n\n" +
		head + first + "\n\tsec += clockOffset\n" + rest
	set := "package main\n\nimport (\n\t\"os\"\n\t\"strconv\"\n\t\"time\"\n)\n\nfunc init() {\n" +
		"\tn, _ := strconv.ParseInt(os.Getenv(\"CLOCK_OFFSET\"), 10, 64)\n\ttime.SetClockOffset(n)\n}\n"
	files := map[string]string{original: changed, filepath.Join(cmd, "clock_of_tests.go"): set}
	replace := map[string]string{}
	for name, text := range files {
		to := filepath.Join(dir, filepath.Base(name))
		if err := os.WriteFile(to, []byte(text), 0o644); err != nil {
			return nil, err
		}
		replace[name] = to
	}
	return replace, nil
}
