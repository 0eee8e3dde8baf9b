package kit

import (
	"strings"
	"testing"
)

// TestPrints: only commands that do nothing but print are run again.
func TestPrints(t *testing.T) {
	for command, want := range map[string]bool{
		"--namespace n run --rm --snapshotter durable ref id":                             true,
		"task exec --exec-id x id /bin/guest cat /file":                                   true,
		"task exec --exec-id x id /bin/guest write /file text":                            false,
		"run --detach --snapshotter durable ref id":                                       false,
		"run --rm --log-uri file:///log --snapshotter durable ref id /bin/witness/writes": false,
		"run -d ref id": false,
		"task ls":       false,
		"image rm ref":  false,
	} {
		if got := prints(strings.Fields(command)); got != want {
			t.Errorf("%s: %t", command, got)
		}
	}
}

// TestInCgroup: a container that is run has the cgroup of its own, or that of the command.
func TestInCgroup(t *testing.T) {
	for command, want := range map[string]string{
		"--namespace n run --rm ref id":    "--namespace n run --cgroup /g --rm ref id",
		"run --cgroup /other -d ref id":    "run --cgroup /other -d ref id",
		"task exec --exec-id x id /bin/ls": "task exec --exec-id x id /bin/ls",
	} {
		if got := strings.Join(inCgroup(strings.Fields(command), "/g"), " "); got != want {
			t.Errorf("%s: %s, want %s", command, got, want)
		}
	}
}
