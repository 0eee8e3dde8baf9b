//go:build faults

package faults

import (
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
)

// Enabled reports whether this binary was built with the tag "faults".
const Enabled = true

var (
	killName, killCount = target(os.Getenv("DURABLE_KILL_AT"))
	hits                atomic.Int64
)

// target splits "name:3" into its parts; without a count the first hit counts.
func target(s string) (string, int64) {
	name, count, ok := strings.Cut(s, ":")
	if !ok {
		return name, 1
	}
	n, err := strconv.ParseInt(count, 10, 64)
	if err != nil || n < 1 {
		panic("faults: DURABLE_KILL_AT=" + s + ": the count is not a positive number")
	}
	return name, n
}

// Point kills the process when the environment names this point. SIGKILL, so
// that no deferred function and no signal handler can tidy up: what is on disk
// is what a power cut of the process alone would leave.
func Point(name Name) {
	if string(name) != killName || hits.Add(1) != killCount {
		return
	}
	_ = syscall.Kill(syscall.Getpid(), syscall.SIGKILL)
	select {} // the signal arrives before another instruction of ours matters
}
