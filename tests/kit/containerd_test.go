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
