package contents

import (
	"archive/tar"
	"bytes"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/archive"
)

var (
	layers = flag.Int("layers", 500, "random layers to unpack and to verify")
	seed   = flag.Uint64("seed", 1, "of the random layers")
)

// TestRandomLayers unpacks random tars with containerd. Whatever the entries do
// to each other, what it made of them must be found right, and a change of any
// file must be found.
func TestRandomLayers(t *testing.T) {
	unpacked, tried, files, links := 0, uint64(0), 0, 0
	for ; unpacked < *layers; tried++ {
		if tried > uint64(*layers)*100 {
			t.Fatalf("containerd unpacks %d of %d tars", unpacked, tried)
		}
		g := &generator{Rand: rand.New(rand.NewPCG(*seed, tried))}
		entries := g.layer()
		layer, err := pack(entries)
		check(t, err)
		how := []string{"removed", "overlay"}[g.IntN(2)]
		root := t.TempDir()
		if _, err := archive.Apply(t.Context(), root, bytes.NewReader(layer), converters[how]...); err != nil {
			continue // such a layer is not there to be verified
		}
		unpacked++
		for _, e := range entries {
			if e.Typeflag == tar.TypeSymlink {
				links++
			}
		}
		report := func(problem string) {
			t.Helper()
			t.Errorf("-seed %d, tar %d, %s: %s\n%s", *seed, tried, how, problem, list(entries))
		}
		if found := verified(t, root, layer); found != "" {
			report("found " + found)
			continue
		}
		check(t, filepath.WalkDir(root, func(name string, e fs.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return err
			}
			info, err := e.Info()
			if err != nil || info.Size() == 0 {
				return err
			}
			files++
			at := g.Int64N(info.Size())
			check(t, flipIn(name, at))
			found, err := VerifyTar(t.Context(), root, bytes.NewReader(layer), 1, Reading{})
			if err != nil || len(found) == 0 || found[0].What != "sha256digest" {
				report(fmt.Sprintf("%s changed: found %v, %v", name, found, err))
			}
			return flipIn(name, at)
		}))
		check(t, os.RemoveAll(root))
	}
	t.Logf("%d layers of %d tars, %d symbolic links, %d files changed", unpacked, tried, links, files)
	if files < unpacked || links < unpacked/4 {
		t.Error("the layers hold too little")
	}
}

func list(entries []tar.Header) string {
	var b strings.Builder
	for _, e := range entries {
		fmt.Fprintf(&b, "\t%c %q %.40q\n", e.Typeflag, e.Name, e.Linkname)
	}
	return b.String()
}

// generator makes tars of few names, so that entries meet.
type generator struct {
	*rand.Rand
	names []string // so far
	count int
}

func (g *generator) pick(from ...string) string { return from[g.IntN(len(from))] }

func (g *generator) layer() []tar.Header {
	var l []tar.Header
	for range 2 + g.IntN(12) {
		l = append(l, g.entry())
	}
	return l
}

func (g *generator) name() string {
	if len(g.names) > 0 && g.IntN(3) == 0 {
		return g.pick(g.names...)
	}
	name := g.pick("a", "b", "c")
	for range g.IntN(3) {
		name = path.Join(name, g.pick("a", "b", "c", "odd\n*", strings.Repeat("long", 40)))
	}
	return name
}

// spelt is another spelling of the same name.
func (g *generator) spelt(name string) string {
	switch g.IntN(12) {
	case 0:
		return "./" + name
	case 1:
		return "/" + name
	case 2:
		return strings.Replace(name, "/", "//", 1)
	case 3:
		return "a/../" + name
	case 4:
		return "../" + name
	}
	return name
}

// body is mostly unlike any other.
func (g *generator) body() string {
	g.count++
	switch g.IntN(12) {
	case 0:
		return ""
	case 1:
		return strings.Repeat(fmt.Sprintf("%15d\n", g.count), chunk/16+g.IntN(3)-1)
	}
	return fmt.Sprintf("number %d%s", g.count, strings.Repeat(".", g.IntN(40)))
}

func (g *generator) entry() tar.Header {
	name := g.name()
	defer func() { g.names = append(g.names, name) }()
	switch n := g.IntN(20); {
	case n < 3:
		return directory(g.spelt(name) + g.pick("", "/"))
	case n < 6:
		return symlink(g.spelt(name), g.pick("a", "b", "/c", "../a", "b/a", "a/../b", "nowhere", "/", "../../../c/."))
	case n < 8 && len(g.names) > 0:
		return hardlink(g.spelt(name), g.spelt(g.pick(g.names...)))
	case n == 8:
		return pipe(g.spelt(name))
	case n == 9:
		return regular(path.Join(path.Dir(name), g.pick(".wh.", ".wh..wh..opq#", ".wh..wh.plnk#")+path.Base(name)), "")
	case n == 10:
		return regular(path.Join(path.Dir(name), ".wh..wh..opq"), "")
	case n == 11 && g.IntN(4) == 0:
		return global()
	}
	h := regular(g.spelt(name), g.body())
	if g.IntN(4) == 0 {
		h.Format = tar.FormatGNU
	}
	return h
}
