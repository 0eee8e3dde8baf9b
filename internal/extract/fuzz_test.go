package extract

import (
	"archive/tar"
	"bytes"
	"cmp"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
)

// builder makes entries out of the bytes of a fuzzer. Names come from a handful, so that
// entries meet.
type builder struct{ bytes []byte }

func (b *builder) next(n int) int {
	if len(b.bytes) == 0 {
		return 0
	}
	v := int(b.bytes[0])
	b.bytes = b.bytes[1:]
	return v % n
}

func pick[T any](b *builder, from ...T) T { return from[b.next(len(from))] }

func (b *builder) path() string {
	var names []string
	for range 1 + b.next(3) {
		names = append(names, pick(b, "a", "b", "c", "d", "l", "a", "b", "..", ".", "", "\xff", ".wh", long))
	}
	return strings.Join(names, "/")
}

func (b *builder) item() item {
	name := b.path()
	i := item{Header: tar.Header{Name: name, Mode: int64(pick(b, 0o644, 0o755, 0o700, 0o4755, 0o2775, 0o1777, 0, 0o6711)), Format: tar.FormatPAX}}
	i.Uid, i.Gid = pick(b, 0, 0, 0, 7, 1000, 3_000_000_000), pick(b, 0, 0, 0, 8)
	i.ModTime = pick(b, oldTime, oldTime, time.Unix(-5, 0), time.Unix(0, 0), time.Unix(8_000_000_000, 9), time.Unix(1<<40, 0))
	if b.next(6) == 0 {
		i.AccessTime = pick(b, time.Unix(1_600_000_000, 5), time.Unix(1, 0))
	}
	if b.next(4) == 0 {
		i = i.xattr(pick(b, "user.one", "user.two", "trusted.three", "security.capability", "system.posix_acl_default", "system.posix_acl_access", "user.overlay.opaque", "odd"),
			pick(b, "", "1", capability, acl(5, 0), acl(7, 5)))
	}
	switch kind := b.next(16); kind {
	case 0, 1, 2:
		i.Typeflag = tar.TypeDir
		i.Name += pick(b, "/", "")
	case 3, 4:
		i.Typeflag, i.Linkname = tar.TypeSymlink, pick(b, b.path(), "/"+b.path(), "../"+b.path())
	case 5, 6:
		i.Typeflag, i.Linkname = tar.TypeLink, pick(b, b.path(), "/"+b.path(), b.path()+"/")
	case 7:
		i.Typeflag = tar.TypeFifo
	case 8:
		i.Typeflag, i.Devmajor, i.Devminor = pick[byte](b, tar.TypeChar, tar.TypeBlock), int64(b.next(3)), int64(b.next(3))
	case 9, 10:
		i.Typeflag = pick[byte](b, tar.TypeReg, tar.TypeReg, tar.TypeDir, tar.TypeLink, tar.TypeChar)
		i.Name += "/.wh." + pick(b, "a", "b", "c", ".wh..opq", ".wh..opq", ".wh..opq", "", ".", "..", ".wh.x", "l")
	case 11:
		i.Typeflag, i.PAXRecords, i.ModTime, i.AccessTime = tar.TypeXGlobalHeader, map[string]string{"comment": "x"}, time.Time{}, time.Time{}
		i.Mode, i.Uid, i.Gid = 0, 0, 0
	default:
		i.Typeflag, i.body = tar.TypeReg, strings.Repeat(string(rune('a'+b.next(26))), pick(b, 0, 1, 600, 5000, early, blockSize+3))
	}
	if i.Typeflag == tar.TypeXGlobalHeader {
		i.Name = strings.ReplaceAll(i.Name, "\xff", "g")
	}
	if i.Typeflag != tar.TypeDir {
		i.Name = cmp.Or(strings.TrimRight(i.Name, "/"), "a") // archive/tar writes no other
	}
	if strings.Contains(i.Name+i.Linkname, "\xff") {
		i.Format, i.ModTime, i.AccessTime = tar.FormatGNU, time.Unix(1_500_000_000, 0), time.Time{}
		i.PAXRecords = nil
	}
	return i
}

// FuzzAsContainerd: no tar is another tree with ours than with containerd's applier. The first
// byte decides about the number of layers, which come one after another into one
// directory, and about the mask of the process.
func FuzzAsContainerd(f *testing.F) {
	root(f)
	inMemory(f) // Go takes an input for one that hangs after ten seconds, which a busy disk needs
	for n := range 40 {
		f.Add([]byte(strings.Repeat(fmt.Sprintf("%c seed %d of %c%c", n, n*n, n*7, n*31), 12)))
	}
	f.Fuzz(func(t *testing.T, data []byte) { compareBytes(t, data) })
}

func compareBytes(t *testing.T, data []byte) {
	b := &builder{bytes: data}
	shape := b.next(256)
	defer unix.Umask(unix.Umask([]int{0o022, 0o077, 0}[shape%3]))
	var layers [][]byte
	for range 1 + shape/3%2 {
		var items []item
		for range 1 + b.next(12) {
			items = append(items, b.item())
		}
		if shape/6%4 > 0 {
			items = fitting(t, items, Whiteouts(shape/24%2))
		}
		layers = append(layers, tarOf(t, items...))
	}
	compare(t, nil, layers...)
}

// fitting leaves out the entries that containerd refuses after those before them: few random
// tars are taken as they are.
func fitting(t *testing.T, items []item, kind Whiteouts) (fit []item) {
	for _, i := range items {
		dir, err := os.MkdirTemp(t.TempDir(), "")
		treetest.Check(t, err)
		more := append(slices.Clone(fit), i)
		if _, err := archive.Apply(t.Context(), dir, bytes.NewReader(tarOf(t, more...)), kinds[kind]...); err == nil {
			fit = more
		}
		treetest.Check(t, os.RemoveAll(dir))
	}
	return fit
}

var (
	randoms = flag.Int("randoms", 300, "how many random tars TestRandom compares")
	seed    = flag.Uint64("seed", 0, "of TestRandom; 0: another one each time")
)

// TestRandom is the fuzz target with random bytes: without instrumentation it compares
// more of them.
func TestRandom(t *testing.T) {
	root(t)
	inMemory(t)
	from := *seed
	for from == 0 {
		from = rand.Uint64N(1e9)
	}
	before := accepted.Load()
	for n := range uint64(*randoms) {
		r := rand.New(rand.NewPCG(from, n))
		data := make([]byte, 40+r.IntN(300))
		for i := range data {
			data[i] = byte(r.Uint32())
		}
		skipped := false
		ok := t.Run(fmt.Sprint(n), func(t *testing.T) {
			defer func() { skipped = t.Skipped() }()
			compareBytes(t, data)
		})
		if !ok || skipped {
			t.Fatalf("not equal, or no tar: -seed %d -randoms %d", from, n+1)
		}
	}
	// Each comes with both kinds of whiteouts, and every other one is two tars.
	if n := accepted.Load() - before; n < int64(*randoms) {
		t.Errorf("only %d of %d tars were taken: too little is compared", n, 3**randoms)
	}
}
