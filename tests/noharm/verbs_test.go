package noharm

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// results runs check or repair. The error is the verb's, also beside results.
func (n *node) results(t testing.TB, args ...string) (all []kit.Verdict, err error) {
	t.Helper()
	stdout, stderr, status, err := n.Daemon.Verb(t.Context(), slices.Insert(slices.Clone(args), 1, "--json")...)
	if err == nil && status != 0 {
		err = fmt.Errorf("%s: status %d: %s", strings.Join(args, " "), status, stderr)
	}
	if bad := json.Unmarshal([]byte(stdout), &all); bad != nil {
		return nil, errors.Join(err, fmt.Errorf("%s: %w: %q", strings.Join(args, " "), bad, stdout))
	}
	return all, err
}
