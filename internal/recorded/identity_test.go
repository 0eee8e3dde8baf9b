package recorded

import (
	"fmt"
	"testing"

	digest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// TestDerivedChainID: where names say nothing, diff IDs and what is below do.
func TestDerivedChainID(t *testing.T) {
	diff := func(i int) string { return digest.FromString(fmt.Sprint("diff ", i)).String() }
	ids := identity.ChainIDs([]digest.Digest{digest.Digest(diff(0)), digest.Digest(diff(1)), digest.Digest(diff(2))})
	entries := map[string]storage.CommitEntry{
		"base":            {Name: "base", DiffID: diff(0)},
		"second":          {Name: "second", DiffID: diff(1), Parent: "base"},
		"third":           {Name: "third", DiffID: diff(2), Parent: "second"},
		"on a named":      {Name: "on a named", DiffID: diff(2), Parent: "named"},
		"named":           {Name: "named", ChainID: ids[1].String(), Parent: "anything"},
		"by hand":         {Name: "by hand", Parent: "second"},
		"on by hand":      {Name: "on by hand", DiffID: diff(2), Parent: "by hand"},
		"parent lost":     {Name: "parent lost", DiffID: diff(2), Parent: "lost"},
		"its own parent":  {Name: "its own parent", DiffID: diff(2), Parent: "its own parent"},
		"no digest at al": {Name: "no digest at al", DiffID: "diff"},
	}
	find := func(name string) (storage.CommitEntry, bool) { e, ok := entries[name]; return e, ok }
	for name, want := range map[string]digest.Digest{
		"base": ids[0], "second": ids[1], "third": ids[2], "on a named": ids[2], "named": ids[1],
	} {
		if got := ChainID(entries[name], find); got != want.String() {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	for _, name := range []string{"by hand", "on by hand", "parent lost", "its own parent", "no digest at al"} {
		if got := ChainID(entries[name], find); got != "" {
			t.Errorf("%s: %q", name, got)
		}
	}
}
