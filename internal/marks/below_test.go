package marks

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
)

// fakeChain answers with the chains in turn, and with the last one from then on.
type fakeChain struct {
	chains  [][]Parent
	read    int
	suspect []uint64
}

func (c *fakeChain) now() []Parent { return c.chains[min(c.read, len(c.chains))-1] }

func (c *fakeChain) Parents(context.Context) ([]Parent, error) {
	c.read++
	return c.now(), nil
}

// Exchanged compares with the chain that the next Parents returns.
func (c *fakeChain) Exchanged(_ context.Context, p Parent) bool {
	for _, next := range c.chains[min(c.read, len(c.chains)-1)] {
		if next.ID == p.ID {
			return next.Digest != p.Digest
		}
	}
	return false
}

func (c *fakeChain) Suspect(_ context.Context, p Parent, why error) error {
	c.suspect = append(c.suspect, p.ID)
	return &BelowError{why}
}

// fakeQuery is decided by a number of layers.
type fakeQuery struct {
	wanted int
	errs   map[string]error // by digest
	asked  []string
}

func (q *fakeQuery) Open() bool { return len(q.asked) < q.wanted }
func (q *fakeQuery) Forget()    { q.asked = nil }

func (q *fakeQuery) Below(_, _, digest string) error {
	q.asked = append(q.asked, digest)
	return q.errs[digest]
}

func (q *fakeQuery) BelowTree(tree string) error {
	q.asked = append(q.asked, tree)
	return nil
}

// TestResolve: seals answer, topmost first, until the query is decided. A healed
// layer is queried again, one whose seal is lost is suspected, and no error that is
// about a layer below is about the one above.
func TestResolve(t *testing.T) {
	chain := func(digests ...string) (parents []Parent) {
		for i, d := range digests {
			parents = append(parents, Parent{ID: uint64(len(digests) - i), Digest: d, Tree: fmt.Sprintf("tree %d", len(digests)-i)})
		}
		return parents
	}
	lost := fmt.Errorf("gone: %w", mtree.ErrUnsealed)
	for name, c := range map[string]struct {
		chains  [][]Parent
		wanted  int
		errs    map[string]error
		asked   string
		read    int
		suspect string
		err     error // errors.Is
	}{
		"all":                  {[][]Parent{chain("c", "b", "a")}, 9, nil, "[c b a]", 1, "[]", nil},
		"decided by the first": {[][]Parent{chain("c", "b", "a")}, 1, nil, "[c]", 1, "[]", nil},
		"decided before":       {[][]Parent{chain("c", "b", "a")}, 0, nil, "[]", 1, "[]", nil},
		"never sealed":         {[][]Parent{chain("c", "", "a")}, 9, nil, "[c tree 2 a]", 1, "[]", nil},
		"seal lost":            {[][]Parent{chain("c", "b", "a")}, 9, map[string]error{"b": lost}, "[c b]", 1, "[2]", mtree.ErrUnsealed},
		"healed meanwhile":     {[][]Parent{chain("c", "b", "a"), chain("c", "healed", "a")}, 9, map[string]error{"b": lost}, "[c healed a]", 2, "[]", nil},
		"healed all the time": {[][]Parent{chain("1"), chain("2"), chain("3"), chain("4")}, 9,
			map[string]error{"1": lost, "2": lost, "3": lost}, "[3]", 3, "[1]", mtree.ErrUnsealed},
		"unreadable": {[][]Parent{chain("c", "b", "a")}, 9, map[string]error{"c": errors.ErrUnsupported}, "[c]", 1, "[]", errors.ErrUnsupported},
	} {
		test := func(t *testing.T, f *fakeChain, known []Parent) {
			q := &fakeQuery{wanted: c.wanted, errs: c.errs}
			err := below{f, known}.resolve(t.Context(), q)
			if !errors.Is(err, c.err) || c.err == nil && err != nil {
				t.Errorf("got %v, want %v", err, c.err)
			}
			if of := (*BelowError)(nil); err != nil && (!errors.As(err, &of) || !errdefs.IsUnavailable(err)) {
				t.Errorf("%v is not the error of a layer below, and Unavailable", err)
			}
			if got := fmt.Sprint(q.asked); got != c.asked {
				t.Errorf("queried %s, want %s", got, c.asked)
			}
			if got := fmt.Sprint(f.suspect); got != c.suspect || f.read != c.read {
				t.Errorf("suspected %s, want %s; the chain was read %d times, want %d", got, c.suspect, f.read, c.read)
			}
		}
		t.Run(name, func(t *testing.T) { test(t, &fakeChain{chains: c.chains}, nil) })
		t.Run(name+", known", func(t *testing.T) { test(t, &fakeChain{chains: c.chains, read: 1}, c.chains[0]) })
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	f := &fakeChain{chains: [][]Parent{chain("a")}}
	if err := (below{chain: f}).resolve(ctx, &fakeQuery{wanted: 1}); !errors.Is(err, context.Canceled) || errdefs.IsUnavailable(err) {
		t.Errorf("its context has ended: %v", err)
	}
}

// TestLost: what a seal attests and its layer has lost makes that layer suspect.
func TestLost(t *testing.T) {
	f := &fakeChain{chains: [][]Parent{{{ID: 2, Tree: "/2/fs"}, {ID: 1, Tree: "/1/fs"}}}}
	b := below{chain: f}
	unavailable := func(err error) {
		t.Helper()
		if of := (*BelowError)(nil); !errors.As(err, &of) || !errdefs.IsUnavailable(err) {
			t.Errorf("%v is not the error of a layer below, and Unavailable", err)
		}
	}
	unavailable(b.lost(t.Context(), errors.ErrUnsupported))
	unavailable(b.lost(t.Context(), &seal.LostError{Tree: "/3/fs"}))
	if len(f.suspect) > 0 {
		t.Errorf("suspected %v", f.suspect)
	}
	unavailable(b.lost(t.Context(), &seal.LostError{Tree: "/1/fs"}))
	if fmt.Sprint(f.suspect) != "[1]" {
		t.Errorf("suspected %v, want [1]", f.suspect)
	}
}
