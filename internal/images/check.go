package images

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"

	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
)

// ErrNotFound is wrapped by the error of Check when what an operator has named does not exist.
var ErrNotFound = errors.New("there is no image")

// Row is a snapshot that the snapshotter itself has.
type Row struct {
	ID        uint64
	Name      string // <namespace>/<number>/<key>
	Parent    string // likewise; "" when there is none
	Committed bool
	Sealed    string    // see repull.Snapshot
	Created   time.Time // by the machine's clock
	Abandoned bool      // an extraction that a restart of the daemon has closed
}

// Options of a Checker.
type Options struct {
	Snapshotter string   // its name in containerd's proxy_plugins
	Namespaces  []string // of images; none: all
	Names       []string // of images, or their digests; none: all
	Deep        bool     // read every layer blob
	// Rows returns what the snapshotter has now.
	Rows func(context.Context) ([]Row, error)
	// Verify verifies the layer of a row. removed: it has gone meanwhile. The error is that
	// of the context.
	Verify func(context.Context, Row) (r verify.Result, removed bool, err error)
	// Blobs is the content store, and Archives are the image archives, that damaged layers can be
	// healed from; nil: none.
	Blobs, Archives blobs.Source
	// Progress is called after each layer and each blob with how many are done, of how
	// many. nil: not.
	Progress func(done, total int)
}

// Checker examines the images of one containerd.
type Checker struct {
	view repull.View
	conn *repull.Containerd
	o    Options
	root string // of the content store, "" when its files cannot be seen from here

	// What was good once is not examined again in the life of a Checker.
	ready map[rowKey]verify.Result
	good  map[digest.Digest]bool // blobs; true: they were read
	flaws map[digest.Digest]flaw // blobs that are not good, of this pass

	done, total int
}

// rowKey identifies a tree: a number is given out again, and a name can be.
type rowKey struct {
	id   uint64
	name string
}

type flaw struct {
	text string
	err  error // nothing is known of the blob
}

// NewChecker returns a Checker that reads through a connection.
func NewChecker(conn *repull.Containerd, o Options) *Checker {
	return &Checker{
		view: conn.View(), conn: conn, o: o,
		ready: map[rowKey]verify.Result{}, good: map[digest.Digest]bool{},
	}
}

// pinnedLabel is given by the CRI plugin to images that the kubelet never removes, such as that
// of the pause container (containerd's internal/cri/labels/labels.go).
const pinnedLabel = "io.cri-containerd.pinned"

// Pinned returns the names of the pinned images of all namespaces.
func Pinned(ctx context.Context, conn *repull.Containerd) (names []string, err error) {
	all, err := conn.View().Namespaces(ctx)
	if err != nil {
		return nil, err
	}
	for _, ns := range all {
		records, err := conn.View().Images(namespaces.WithNamespace(ctx, ns))
		if err != nil {
			return nil, err
		}
		for _, r := range records {
			if r.Labels[pinnedLabel] == "pinned" {
				names = append(names, r.Name)
			}
		}
	}
	return names, nil
}

const (
	// settle is longer than an operation of containerd is between its own record and the
	// snapshotter's.
	settle = time.Second
	// fetchWithin is the age of a download that is still at work: containerd notes the time
	// with each part that arrives.
	fetchWithin = time.Minute
	// unpackWithin is the same of an extraction, of which only the beginning is known. That of
	// a client that has died is there until its lease ends, after a day.
	unpackWithin = 15 * time.Minute
)

// Check examines the selected images, in the order of namespaces and names. The error means
// that the state of no image is known: containerd does not answer, or it wraps ErrNotFound.
func (c *Checker) Check(ctx context.Context) ([]Image, error) {
	found, err := c.pass(ctx, nil)
	if err != nil {
		return nil, err
	}
	for _, name := range c.o.Names {
		if !slices.ContainsFunc(found, func(i Image) bool { return i.called(name) }) {
			return nil, fmt.Errorf("%w of the name or digest %q", ErrNotFound, name)
		}
	}
	doubtful := map[place]bool{}
	for _, i := range found {
		if i.Verdict != Ready {
			doubtful[i.place()] = true
		}
	}
	if len(doubtful) == 0 {
		return found, nil
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(settle):
	}
	again, err := c.pass(ctx, doubtful)
	if err != nil {
		return nil, err
	}
	// One that is not there any more was removed: it is left out.
	found = slices.DeleteFunc(found, func(i Image) bool { return doubtful[i.place()] })
	found = append(found, again...)
	slices.SortStableFunc(found, order)
	return found, nil
}

func order(a, b Image) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Platform, b.Platform))
}

// place is where the names of an image point to.
type place struct {
	namespace string
	target    digest.Digest
}

func (i Image) place() place { return place{i.Namespace, i.Target} }

// called reports whether an operator means the image by a name.
func (i Image) called(name string) bool {
	return slices.Contains(i.Names, name) || name == i.Target.String() || name == i.Manifest.String()
}

// pass examines the selected images once, or those of only.
func (c *Checker) pass(ctx context.Context, only map[place]bool) ([]Image, error) {
	c.flaws = map[digest.Digest]flaw{}
	all, err := c.view.Namespaces(ctx)
	if err != nil {
		return nil, err
	}
	slices.Sort(all)
	for _, ns := range c.o.Namespaces {
		if !slices.Contains(all, ns) {
			return nil, fmt.Errorf("%w: containerd has no namespace %q", ErrNotFound, ns)
		}
	}
	if err := c.findRoot(ctx); err != nil {
		return nil, err
	}
	var spaces []*space
	for _, ns := range all {
		if len(c.o.Namespaces) > 0 && !slices.Contains(c.o.Namespaces, ns) {
			continue
		}
		if only != nil && !slices.ContainsFunc(slices.Collect(maps.Keys(only)), func(p place) bool { return p.namespace == ns }) {
			continue
		}
		s, err := c.read(namespaces.WithNamespace(ctx, ns), ns, only)
		if err != nil {
			return nil, fmt.Errorf("namespace %s: %w", ns, err)
		}
		spaces = append(spaces, s)
	}
	// After everything of containerd: see the comment of the package.
	rows, err := c.o.Rows(ctx)
	if err != nil {
		return nil, err
	}
	for _, s := range spaces {
		s.take(rows)
	}
	c.count(spaces)
	found := []Image{}
	for _, s := range spaces {
		ctx := namespaces.WithNamespace(ctx, s.name)
		for _, e := range s.entries {
			i, err := c.examine(ctx, s, e)
			if err != nil {
				return nil, err
			}
			found = append(found, i)
		}
	}
	slices.SortStableFunc(found, order)
	return found, nil
}

func (c *Checker) step() {
	c.done++
	if c.o.Progress != nil {
		c.o.Progress(c.done, max(c.done, c.total))
	}
}

// count determines how much there is to do in a pass.
func (c *Checker) count(spaces []*space) {
	rows, blobs := map[rowKey]bool{}, map[digest.Digest]bool{}
	for _, s := range spaces {
		for _, e := range s.entries {
			for _, name := range e.manifest.Chain() {
				for _, r := range s.committed[name] {
					if key := (rowKey{r.ID, r.Name}); c.ready[key].Name == "" {
						rows[key] = true
					}
				}
			}
			for _, d := range e.layerBlobs() {
				if read, ok := c.good[d.Digest]; !ok || c.o.Deep && !read {
					blobs[d.Digest] = true
				}
			}
		}
	}
	c.total += len(rows) + len(blobs)
}

// sortNames puts the name of an image that people know it by first: a tag, then a digest,
// then the CRI plugin's own name, which is a digest without a repository.
func sortNames(names []string) {
	rank := func(n string) int {
		switch {
		case strings.HasPrefix(n, "sha256:"):
			return 2
		case strings.Contains(n, "@"):
			return 1
		}
		return 0
	}
	slices.SortFunc(names, func(a, b string) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a, b))
	})
}
