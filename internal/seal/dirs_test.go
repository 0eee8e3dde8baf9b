package seal

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/finding"
	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
	"github.com/durable-snapshotter/durable-snapshotter/overlayutil"
)

// dirNames sort differently with and without what comes after them in a path.
var dirNames = []string{"a", "a-", "a b", "\xff"}

// layerBuilder fills directories at random with what overlayfs reads in a layer.
// Every directory has a mode of its own, which shows where it comes from.
type layerBuilder struct {
	*rand.Rand
	space overlayutil.Space
	mode  fs.FileMode
}

func (b *layerBuilder) fill(t *testing.T, dir string, depth int) {
	t.Helper()
	around, err := b.space.Get(dir, overlayutil.AttrOpaque)
	check(t, err)
	for _, name := range dirNames {
		path := filepath.Join(dir, name)
		switch n := b.IntN(10); {
		case n < 5 && depth < 3:
			b.mode++
			check(t, os.Mkdir(path, 0o700))
			check(t, os.Chown(path, b.IntN(3), b.IntN(3)))
			check(t, os.Chmod(path, b.mode%0o1000))
			switch b.IntN(6) {
			case 0:
				check(t, b.space.Set(path, overlayutil.AttrOpaque, overlayutil.Opaque))
			case 1:
				check(t, b.space.Set(path, overlayutil.AttrOpaque, overlayutil.XattrWhiteouts))
			case 2:
				check(t, b.space.Other().Set(path, overlayutil.AttrOpaque, overlayutil.Opaque)) // means nothing
			case 3:
				check(t, unix.Setxattr(path, "user.long", bytes.Repeat([]byte{byte(b.mode)}, longValue+1), 0))
				check(t, unix.Setxattr(path, "user.odd name", []byte("\x00\xff"), 0))
			}
			b.fill(t, path, depth+1)
		case n == 5:
			check(t, overlayutil.MakeWhiteout(path))
		case n == 6 && around == overlayutil.XattrWhiteouts:
			check(t, os.WriteFile(path, nil, 0o600))
			check(t, b.space.Set(path, overlayutil.AttrWhiteout, ""))
		case n == 7:
			check(t, os.WriteFile(path, nil, 0o600))
		case n == 8:
			check(t, os.Symlink(".", path))
		}
	}
}

// everyDir makes all directories that a layer of layerBuilder may have.
func everyDir(t *testing.T, dir string, depth int) {
	t.Helper()
	for _, name := range dirNames {
		path := filepath.Join(dir, name)
		check(t, os.Mkdir(path, 0o755))
		if depth < 3 {
			everyDir(t, path, depth+1)
		}
	}
}

// TestDirsAgreeWithTheDisk: on random layers, some of them never sealed, Dirs and Top
// find by seals what overlayutil.Stack finds on disk, which in turn agrees with the
// kernel (TestStackAgreesWithTheKernel).
func TestDirsAgreeWithTheDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("devices and trusted attributes need root")
	}
	own := t.TempDir()
	everyDir(t, own, 0)
	ownSeal, ownSummary := sealOf(t, own)
	for _, space := range []overlayutil.Space{overlayutil.Trusted, overlayutil.User} {
		for seed := range uint64(20) {
			t.Run(fmt.Sprint(space, seed), func(t *testing.T) {
				b := &layerBuilder{Rand: rand.New(rand.NewPCG(seed, 2)), space: space}
				stack := overlayutil.Stack{Space: space}
				listed, err := ListDirs(t.Context(), own, space, func(*Entry) bool { return true })
				check(t, err)
				sealed, err := SealedDirs(ownSeal, ownSummary.Digest, space)
				check(t, err)
				top := NewTop(space)
				for range 1 + b.IntN(4) {
					tree := t.TempDir()
					if b.IntN(3) == 0 {
						check(t, space.Set(tree, overlayutil.AttrOpaque, []string{overlayutil.Opaque, overlayutil.XattrWhiteouts}[b.IntN(2)]))
					}
					b.fill(t, tree, 0)
					stack.Layers = append(stack.Layers, tree)
					file, s := sealOf(t, tree)
					for _, below := range []interface {
						Below(string, string, string) error
						BelowTree(string) error
					}{listed, sealed, top} {
						if b.IntN(4) == 0 {
							check(t, below.BelowTree(tree))
						} else {
							check(t, below.Below(tree, file, s.Digest))
						}
					}
				}
				compareDirs(t, own, stack, listed)
				compareDirs(t, own, stack, sealed)
				names, err := stack.Top()
				check(t, err)
				if !slices.Equal(top.Names(), names) {
					t.Errorf("in the root %q, by the disk %q", top.Names(), names)
				}
			})
		}
	}
}

func compareDirs(t *testing.T, own string, stack overlayutil.Stack, d *Dirs) {
	t.Helper()
	shown := 0
	check(t, filepath.WalkDir(own, func(path string, e fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(own, path)
		if err != nil || rel == "." {
			return err
		}
		want := "nothing"
		on, err := stack.Lookup(rel)
		if err == nil && on != "" {
			var e Entry
			if e, err = Read(on, rel); err == nil && e.Type() == unix.S_IFDIR {
				want = describe(e)
				shown++
			}
		}
		check(t, err)
		got := "nothing"
		e2, found, err := d.Shown(rel)
		check(t, err)
		if found {
			got = describe(e2)
		}
		if got != want {
			t.Errorf("%q: by the seals %.200s, by the disk %.200s", rel, got, want)
		}
		return nil
	}))
	if shown == 0 {
		t.Log("no directory is shown")
	}
	// Questions in another order have the same answers.
	for _, rel := range []string{"a-", "a", "a/a", "a"} {
		_, found, err := d.Shown(rel)
		check(t, err)
		on, err := stack.Lookup(rel)
		check(t, err)
		st, statErr := os.Lstat(on)
		if found != (statErr == nil && st.IsDir()) {
			t.Errorf("%s queried again: found %v", rel, found)
		}
	}
}

func describe(e Entry) string {
	attrs := slices.DeleteFunc(slices.Clone(e.Xattrs), func(x Xattr) bool { return !Inheritable(x.Name) })
	return fmt.Sprintf("%o %d:%d %q", e.Stat.Mode, e.Stat.Uid, e.Stat.Gid, attrs)
}

// TestDirsOfSeal: nothing is queried below an opaque directory of the layer itself, and
// nothing at all when its root is opaque.
func TestDirsOfSeal(t *testing.T) {
	root := t.TempDir()
	for _, dir := range []string{"plain/in", "opaque/in", "opaque-/in"} {
		check(t, os.MkdirAll(filepath.Join(root, dir), 0o755))
	}
	check(t, os.WriteFile(filepath.Join(root, "file"), nil, 0o600))
	check(t, overlayutil.User.Set(filepath.Join(root, "opaque"), overlayutil.AttrOpaque, overlayutil.Opaque))
	read := func() *Dirs {
		t.Helper()
		file, s := sealOf(t, root)
		d, err := SealedDirs(file, s.Digest, overlayutil.User)
		check(t, err)
		return d
	}
	d := read()
	var wanted []string
	for _, rel := range []string{".", "plain", "plain/in", "opaque", "opaque/in", "opaque-", "opaque-/in", "file", "gone", "opaque/gone"} {
		if d.Wanted(rel) {
			wanted = append(wanted, rel)
		}
	}
	if want := []string{"plain", "plain/in", "opaque", "opaque-", "opaque-/in"}; !slices.Equal(wanted, want) || !d.Open() || d.RootOpaque() {
		t.Errorf("wanted %q, want %q; open %v", wanted, want, d.Open())
	}
	check(t, overlayutil.User.Set(root, overlayutil.AttrOpaque, overlayutil.Opaque))
	if d := read(); d.Open() || !d.RootOpaque() {
		t.Error("below an opaque root something is queried")
	}
	file, s := sealOf(t, root)
	names, err := SealedTop(file, s.Digest, overlayutil.User)
	if want := "map[file:true opaque:true opaque-:false plain:false]"; err != nil || fmt.Sprint(names) != want {
		t.Errorf("top %v, %v; want %s", names, err, want)
	}
}

// TestDirsOfBadSeals: a seal that is lost, or is not the one that was written, proves
// nothing, whatever lines it has.
func TestDirsOfBadSeals(t *testing.T) {
	own, lower := t.TempDir(), t.TempDir()
	check(t, os.MkdirAll(filepath.Join(own, "d/e"), 0o755))
	check(t, os.MkdirAll(filepath.Join(lower, "d/e"), 0o700))
	file, s := sealOf(t, lower)
	list := func() *Dirs {
		t.Helper()
		d, err := ListDirs(t.Context(), own, overlayutil.Trusted, func(*Entry) bool { return true })
		check(t, err)
		return d
	}
	for name, c := range map[string]struct {
		digest string
		spoil  func() error
	}{
		"another digest": {"sha256:" + strings.Repeat("0", 64), func() error { return nil }},
		"cut":            {s.Digest, func() error { return os.Truncate(file, 60) }},
		"empty":          {s.Digest, func() error { return os.Truncate(file, 0) }},
		"missing":        {s.Digest, func() error { return os.Remove(file) }},
	} {
		good, err := os.ReadFile(file)
		check(t, err)
		check(t, c.spoil())
		if err := list().Below(lower, file, c.digest); !errors.Is(err, mtree.ErrUnsealed) {
			t.Errorf("%s: Dirs: %v", name, err)
		}
		if err := NewTop(overlayutil.Trusted).Below(lower, file, c.digest); !errors.Is(err, mtree.ErrUnsealed) {
			t.Errorf("%s: Top: %v", name, err)
		}
		if _, err := SealedDirs(file, c.digest, overlayutil.Trusted); !errors.Is(err, mtree.ErrUnsealed) {
			t.Errorf("%s: SealedDirs: %v", name, err)
		}
		check(t, os.WriteFile(file, good, 0o600))
	}
	d := list()
	check(t, d.Below(lower, file, s.Digest))
	// What is forgotten can be queried again.
	d.Forget()
	if _, found, err := d.Shown("d/e"); found || err != nil || !d.Open() {
		t.Errorf("forgotten: found %v, %v", found, err)
	}
	check(t, d.Below(lower, file, s.Digest))
	if e, found, err := d.Shown("d/e"); !found || err != nil || e.Stat.Mode&0o7777 != 0o700 || d.Open() {
		t.Errorf("%v %v %v", e, found, err)
	}
}

// TestLostValue: a long value is not in the seal, and one that is not on disk any more
// is not made up.
func TestLostValue(t *testing.T) {
	own, lower := t.TempDir(), t.TempDir()
	path := filepath.Join(lower, "d")
	check(t, errors.Join(os.Mkdir(filepath.Join(own, "d"), 0o755), os.Mkdir(path, 0o700)))
	long := strings.Repeat("x", longValue+1)
	check(t, unix.Setxattr(path, "user.long", []byte(long), 0))
	file, s := sealOf(t, lower)
	d, err := ListDirs(t.Context(), own, overlayutil.Trusted, func(*Entry) bool { return true })
	check(t, err)
	check(t, d.Below(lower, file, s.Digest))
	if e, found, err := d.Shown("d"); err != nil || !found || len(e.Xattrs) != 1 || e.Xattrs[0].Value != long {
		t.Errorf("%v %v %v", e, found, err)
	}
	for name, spoil := range map[string]func() error{
		"another value": func() error { return unix.Setxattr(path, "user.long", []byte(long+"y"), 0) },
		"no value":      func() error { return unix.Removexattr(path, "user.long") },
		"no directory":  func() error { return os.Remove(path) },
	} {
		check(t, errors.Join(os.MkdirAll(path, 0o700), unix.Setxattr(path, "user.long", []byte(long), 0)))
		check(t, spoil())
		_, _, err := d.Shown("d")
		if lost := (*LostError)(nil); !errors.As(err, &lost) || lost.Tree != lower {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestCompareDirs: findings are those of directories that count, as an entry is
// compared with its seal.
func TestCompareDirs(t *testing.T) {
	own, lower := t.TempDir(), t.TempDir()
	for i, mode := range []fs.FileMode{0o700, 0o711, 0o755} {
		name := strconv.Itoa(i)
		check(t, errors.Join(os.Mkdir(filepath.Join(own, name), 0o755), os.Mkdir(filepath.Join(lower, name), 0o700), os.Chmod(filepath.Join(lower, name), mode)))
	}
	check(t, os.Chown(filepath.Join(lower, "1"), 5, 6))
	check(t, unix.Setxattr(filepath.Join(lower, "2"), "user.kind", []byte("d"), 0))
	check(t, unix.Setxattr(filepath.Join(own, "2"), "user.stamp", []byte("harmless"), 0))
	check(t, os.WriteFile(filepath.Join(own, "3"), nil, 0o600))
	file, s := sealOf(t, own)
	d, err := SealedDirs(file, s.Digest, overlayutil.Trusted)
	check(t, err)
	lowerSeal, lowerSummary := sealOf(t, lower)
	check(t, d.Below(lower, lowerSeal, lowerSummary.Digest))
	var asked []string
	found, err := d.Compare(file, s.Digest, 10, func(rel string) (bool, error) { asked = append(asked, rel); return rel != "0", nil })
	want := []finding.Finding{
		{Path: "1", What: "mode", Want: "0711", Have: "0755", Below: true}, {Path: "1", What: "uid", Want: "5", Have: "0", Below: true},
		{Path: "1", What: "gid", Want: "6", Have: "0", Below: true}, {Path: "2", What: "xattr.user.kind", Want: `"d"`, Below: true},
	}
	if err != nil || !slices.Equal(found, want) || fmt.Sprint(asked) != "[0 1 2]" {
		t.Errorf("found %+v, %v; asked %q", found, err, asked)
	}
	if found, err := d.Compare(file, s.Digest, 2, func(string) (bool, error) { return true, nil }); err != nil || len(found) != 2 {
		t.Errorf("at most 2: %v, %v", found, err)
	}
	refusal := errors.New("cannot decide")
	if _, err := d.Compare(file, s.Digest, 2, func(string) (bool, error) { return false, refusal }); !errors.Is(err, refusal) {
		t.Errorf("%v", err)
	}
}

// writeSeal writes a seal of the given lines.
func writeSeal(t testing.TB, lines func(write func(e Entry))) (file, digest string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "seal")
	w, err := mtree.Create(file, nil)
	check(t, err)
	var line []byte
	lines(func(e Entry) {
		line = e.appendLine(line[:0])
		_, err := w.Write(line)
		check(t, err)
	})
	digest = w.Digest()
	check(t, w.Close())
	return file, digest
}

// dirsLimit is how much memory a question to large lower layers may take: the
// directories of this layer, and a line.
const dirsLimit = 40 << 20

// TestDirsMemory: a lower layer of 300,000 directories with attributes that all
// differ, 200 MiB of them, takes no memory where this layer has no directory, and
// attributes that would take more than shownLimit are refused.
func TestDirsMemory(t *testing.T) {
	const entries = 300_000
	value := func(i int) []Xattr {
		return []Xattr{{"user.v", strings.Repeat(strconv.Itoa(i%10), 500) + strconv.Itoa(i)}}
	}
	file, digest := writeSeal(t, func(write func(Entry)) {
		st := unix.Stat_t{Mode: unix.S_IFDIR | 0o700}
		write(Entry{Path: ".", Stat: st})
		for i := range entries {
			write(Entry{Path: fmt.Sprintf("d%07d", i), Stat: st, Xattrs: value(i)})
		}
	})
	few, many := newDirs(overlayutil.Trusted), newDirs(overlayutil.Trusted)
	check(t, errors.Join(few.add(".", false), many.add(".", false)))
	for i := range entries {
		name := fmt.Sprintf("d%07d", i)
		if i%3_000 == 0 {
			check(t, few.add(name, true))
		}
		check(t, many.add(name, true))
	}
	few.close(0)
	many.close(0)
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	check(t, few.Below("/none", file, digest))
	if few.Open() {
		t.Error("not everything was found")
	}
	if more := int64(heap()) - int64(before); more > 1<<20 {
		t.Errorf("a hundred directories take %d bytes", more)
	}
	err := many.Below("/none", file, digest)
	if err == nil || !strings.Contains(err.Error(), "attributes of directories") {
		t.Errorf("attributes without bound: %v", err)
	}
	if more := int64(heap()) - int64(before); more > dirsLimit {
		t.Errorf("that many directories take %d bytes", more)
	}
	runtime.KeepAlive(few)
	runtime.KeepAlive(many)
}

// TestDirsStopReading: with everything decided, no further layer is opened; and a
// directory of this layer costs a few bytes beside its last name.
func TestDirsStopReading(t *testing.T) {
	d := newDirs(overlayutil.Trusted)
	check(t, d.add(".", false))
	deep := ""
	for range 500 {
		deep = strings.TrimPrefix(deep+"/deep", "/")
		check(t, d.add(deep, true))
	}
	d.close(0)
	if len(d.names) != 500*len("deep") {
		t.Errorf("500 names of 4 bytes take %d", len(d.names))
	}
	file, digest := writeSeal(t, func(write func(Entry)) {
		write(Entry{Path: ".", Stat: unix.Stat_t{Mode: unix.S_IFDIR}})
		for path := "deep"; len(path) <= len(deep); path += "/deep" {
			write(Entry{Path: path, Stat: unix.Stat_t{Mode: unix.S_IFDIR | 0o700}})
		}
	})
	check(t, d.Below("/none", file, digest))
	if d.Open() {
		t.Error("still open")
	}
	if e, found, err := d.Shown(deep); err != nil || !found || e.Stat.Mode != unix.S_IFDIR|0o700 {
		t.Errorf("%v, %v, %v", e, found, err)
	}
}

// BenchmarkDirs queries a chain of 10 layers, of 30,000 entries together, about the
// directories of a layer that has 300 of them, as a Commit does.
func BenchmarkDirs(b *testing.B) {
	own := wideTree(b, 300, 0)
	type lower struct{ file, digest string }
	var chain []lower
	for layer := range 10 {
		file, digest := writeSeal(b, func(write func(Entry)) {
			st := unix.Stat_t{Mode: unix.S_IFDIR | 0o755, Mtim: unix.Timespec{Sec: 1_700_000_000}}
			write(Entry{Path: ".", Stat: st})
			names := []string{}
			for i := range 30 {
				names = append(names, fmt.Sprintf("usr%d", layer*30+i))
			}
			slices.Sort(names)
			for _, dir := range names {
				write(Entry{Path: dir, Stat: st})
				for i := range 99 {
					write(Entry{Path: fmt.Sprintf("%s/library%02d.so.1.2.3", dir, i), Stat: unix.Stat_t{Mode: unix.S_IFREG | 0o644, Size: int64(i) * 997, Mtim: st.Mtim}})
				}
			}
		})
		chain = append(chain, lower{file, digest})
	}
	var took []time.Duration
	for b.Loop() {
		began := time.Now()
		d, err := ListDirs(b.Context(), own, overlayutil.Trusted, func(*Entry) bool { return true })
		check(b, err)
		for _, l := range chain {
			check(b, d.Below("/none", l.file, l.digest))
		}
		took = append(took, time.Since(began))
	}
	b.ReportMetric(float64(median(took).Microseconds())/1000, "ms/chain")
}
