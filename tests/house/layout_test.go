package house

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// The directories of the two modules, seen from this package.
const (
	product = "../.."
	tests   = ".."
)

const module = "github.com/durable-snapshotter/durable-snapshotter"

// ours lists, for each package of the product, which of our packages it may
// import. Arrows point from what decides to what knows.
var ours = map[string][]string{
	"fsync":                   {},
	"internal/blobs":          {"internal/inflate"},
	"internal/boltcheck":      {}, // its tests import bbolt, to make files
	"internal/extract":        {"fsync", "internal/idle", "internal/tree", "internal/twosums"},
	"internal/faults":         {},
	"internal/finding":        {},
	"internal/metrics":        {},
	"internal/idle":           {},
	"internal/mounts":         {},
	"internal/sockets":        {},
	"internal/tree":           {},
	"internal/writeback":      {"internal/idle", "internal/tree"},
	"internal/layout":         {"fsync"},
	"internal/inflate":        {"internal/gunzip"},
	"internal/gunzip":         {},
	"internal/twosums":        {},
	"internal/archives":       {"internal/blobs", "internal/inflate"},
	"internal/library":        {"internal/inflate"},
	"internal/mtree":          {"fsync", "internal/tree"},
	"internal/treetest":       {"internal/finding"}, // for tests only
	"overlayutil":             {"fsync", "internal/tree"},
	"internal/contents":       {"fsync", "internal/finding", "internal/idle", "internal/mtree", "internal/tree"},
	"internal/repull":         {"internal/library"},
	"internal/refill":         {"internal/library", "internal/repull"},
	"internal/notify":         {"internal/metrics", "internal/refill", "internal/repull"},
	"internal/seal":           {"fsync", "overlayutil", "internal/finding", "internal/idle", "internal/mtree", "internal/tree"},
	"storage":                 {"fsync", "internal/boltcheck", "internal/faults", "internal/finding", "internal/layout"}, // the journal keeps findings
	"internal/gate":           {"fsync", "storage", "internal/faults", "internal/metrics"},
	"internal/marks":          {"overlayutil", "internal/finding", "internal/layout", "internal/mtree", "internal/seal", "internal/tree"},
	"internal/active":         {"internal/gate", "internal/layout", "internal/marks", "internal/seal"},
	"internal/rebuild":        {"fsync", "storage", "internal/layout", "internal/mtree", "internal/seal"},
	"internal/verify":         {"storage", "internal/blobs", "internal/contents", "internal/finding", "internal/layout", "internal/metrics", "internal/mtree", "internal/seal", "internal/tree"},
	"internal/brake":          {"storage", "internal/finding", "internal/layout", "internal/tree", "internal/verify"},
	"internal/recorded":       {"storage", "internal/layout", "internal/mtree", "internal/verify"},
	"internal/replaced":       {"fsync", "storage", "internal/faults", "internal/gate", "internal/layout", "internal/mounts", "internal/tree"},
	"internal/scrub":          {"storage", "internal/contents", "internal/gate", "internal/idle", "internal/metrics", "internal/verify"},
	"internal/unpack":         {"fsync", "overlayutil", "storage", "internal/blobs", "internal/contents", "internal/extract", "internal/gate", "internal/layout", "internal/marks", "internal/seal"},
	"internal/orphans":        {"internal/repull"},
	"internal/images":         {"storage", "internal/blobs", "internal/library", "internal/refill", "internal/repull", "internal/verify"},
	"internal/layers":         {"fsync", "overlayutil", "storage", "internal/blobs", "internal/brake", "internal/contents", "internal/faults", "internal/finding", "internal/gate", "internal/idle", "internal/layout", "internal/marks", "internal/metrics", "internal/mtree", "internal/recorded", "internal/scrub", "internal/unpack", "internal/verify"},
	"snapshotter":             {"fsync", "overlayutil", "storage", "internal/active", "internal/archives", "internal/blobs", "internal/extract", "internal/faults", "internal/gate", "internal/layers", "internal/layout", "internal/marks", "internal/metrics", "internal/recorded", "internal/replaced", "internal/scrub", "internal/seal", "internal/tree", "internal/unpack", "internal/verify", "internal/writeback"},
	"internal/migrate":        {"internal/images", "internal/repull"},
	"internal/differ":         {"fsync", "snapshotter", "internal/blobs", "internal/extract", "internal/inflate", "internal/marks", "internal/metrics", "internal/unpack"},
	"internal/imagecheck":     {"snapshotter", "storage", "internal/blobs", "internal/images", "internal/layers", "internal/layout", "internal/repull", "internal/verify"},
	"docs":                    {},
	"internal/doctor":         {"docs", "fsync", "snapshotter", "storage", "internal/blobs", "internal/imagecheck", "internal/images", "internal/layout", "internal/orphans", "internal/repull", "internal/verify"},
	"internal/admin":          {"snapshotter", "storage", "internal/imagecheck", "internal/images", "internal/layers", "internal/metrics", "internal/verify"},
	"cmd/durable-snapshotter": {"fsync", "snapshotter", "storage", "internal/admin", "internal/blobs", "internal/differ", "internal/doctor", "internal/imagecheck", "internal/images", "internal/layers", "internal/layout", "internal/metrics", "internal/migrate", "internal/notify", "internal/orphans", "internal/rebuild", "internal/refill", "internal/repull", "internal/scrub", "internal/sockets", "internal/verify"},
}

// only lists packages of others that few packages of ours, mostly one, may import,
// and why.
var only = map[string]struct{ importer, why string }{
	"go.etcd.io/bbolt": {"storage", "one package decides what a transaction is"},
	"github.com/containerd/containerd/v2/core/snapshots/storage":                 {"storage", "rows and journal must change together"},
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay":              {"snapshotter", "the order around it is the product"},
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils": {"overlayutil", "facts about overlayfs have one home"},
	"github.com/containerd/containerd/v2/plugins/content/local":                  {"internal/blobs", "how containerd's blobs lie on disk has one home"},
	"google.golang.org/grpc":          {"cmd/durable-snapshotter internal/repull", "the snapshotter can be used without a daemon; containerd is reached over gRPC only"},
	"github.com/pelletier/go-toml/v2": {"cmd/durable-snapshotter internal/doctor", "parsing is on one side, behaviour on the other; doctor examines containerd's files"},
}

type listed struct {
	ImportPath, Doc string
	Imports         []string
}

// goList lists the packages of the module in dir.
func goList(t *testing.T, dir string, args ...string) (all []listed) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"list", "-json=ImportPath,Doc,Imports"}, append(args, "./...")...)...)
	cmd.Dir = dir
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err, cmd.Stderr)
	}
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p listed
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

func TestImportsPointOneWay(t *testing.T) {
	for _, p := range goList(t, product, "-tags", "faults") {
		name := strings.TrimPrefix(p.ImportPath, module+"/")
		allowed, known := ours[name]
		if !known {
			t.Errorf("package %s is not in the list: say what it may import", name)
		}
		for _, i := range p.Imports {
			if rest, mine := strings.CutPrefix(i, module+"/"); mine && !slices.Contains(allowed, rest) {
				t.Errorf("%s imports %s", name, rest)
			}
			for path, rule := range only {
				below := strings.HasPrefix(i, path+"/") && only[i].importer == ""
				if (i == path || below) && !slices.Contains(strings.Fields(rule.importer), name) {
					t.Errorf("%s imports %s, only %s may: %s", name, i, rule.importer, rule.why)
				}
			}
		}
	}
}

func TestEveryPackageIntroducesItself(t *testing.T) {
	for _, p := range append(goList(t, product), goList(t, tests)...) {
		if len(p.Doc) < 40 {
			t.Errorf("%s has no package comment that go doc shows: %q", p.ImportPath, p.Doc)
		}
	}
}

// The parts of the tests are for plain programs, too: only kittest knows what a
// test is.
func TestOnlyKittestKnowsTesting(t *testing.T) {
	for _, p := range goList(t, tests) {
		if knows := slices.Contains(p.Imports, "testing"); knows != strings.HasSuffix(p.ImportPath, "/tests/kit/kittest") {
			t.Errorf("%s imports package testing: %v", p.ImportPath, knows)
		}
	}
}
