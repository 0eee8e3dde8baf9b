package extract

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/contents"
	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
)

func TestMain(m *testing.M) {
	_ = log.SetLevel("error") // ignored attributes are expected
	treetest.Main(m)
}

// item is an entry of a tar and its content.
type item struct {
	tar.Header
	body string
}

var oldTime = time.Unix(1_500_000_000, 987_654_321)

func tarOf(t testing.TB, items ...item) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, i := range items {
		h := i.Header
		h.Size = int64(len(i.body))
		if h.ModTime.IsZero() {
			h.ModTime = oldTime
		}
		if h.Format == 0 {
			h.Format = tar.FormatPAX
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			h.ModTime, h.Size = time.Time{}, 0
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Skipf("no tar of it: %v", err)
		}
		if _, err := w.Write([]byte(i.body)); err != nil {
			t.Fatal(err)
		}
	}
	treetest.Check(t, w.Close())
	return b.Bytes()
}

func dirItem(name string, mode int64) item {
	return item{Header: tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode}}
}

func fileItem(name, body string) item {
	return item{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, body: body}
}

func linkItem(kind byte, name, target string) item {
	return item{Header: tar.Header{Typeflag: kind, Name: name, Linkname: target, Mode: 0o777}}
}

func symlinkItem(name, target string) item  { return linkItem(tar.TypeSymlink, name, target) }
func hardlinkItem(name, target string) item { return linkItem(tar.TypeLink, name, target) }

func (i item) with(change func(*tar.Header)) item {
	change(&i.Header)
	return i
}

func (i item) xattr(name, value string) item {
	records := map[string]string{"SCHILY.xattr." + name: value}
	for k, v := range i.PAXRecords {
		records[k] = v
	}
	i.PAXRecords = records
	return i
}

// state is a tree as a text for each path: all of it that both appliers determine.
type state map[string]string

// stateOf reads a tree. Times after since are those of the kernel's clock.
func stateOf(t testing.TB, root string, since time.Time) state {
	t.Helper()
	all := state{}
	var files []string
	treetest.Check(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		e, err := seal.Read(path, rel)
		if errors.Is(err, unix.EINVAL) {
			// The kernel stores some capabilities that it does not read.
			e.Xattrs = []seal.Xattr{{Name: "cannot be read"}}
		} else if err != nil {
			return err
		}
		links := uint64(0)
		if e.Type() != unix.S_IFDIR {
			links = uint64(e.Stat.Nlink)
		}
		clock := func(ts unix.Timespec) string {
			if at := time.Unix(ts.Unix()); at.Before(since) || at.After(time.Now()) {
				return at.UTC().Format(time.RFC3339Nano)
			}
			return "now"
		}
		all[rel] = fmt.Sprintf("mode %o owner %d:%d links %d device %d link %q xattrs %q accessed %s modified %s",
			e.Stat.Mode, e.Stat.Uid, e.Stat.Gid, links, e.Stat.Rdev, e.Link, e.Xattrs, clock(e.Stat.Atim), clock(e.Stat.Mtim))
		if e.Type() == unix.S_IFREG {
			files = append(files, rel)
		}
		return nil
	}))
	for _, rel := range files { // after the times of access
		body, err := os.ReadFile(filepath.Join(root, rel))
		treetest.Check(t, err)
		all[rel] += fmt.Sprintf(" size %d sum %x", len(body), sha256.Sum256(body))
	}
	return all
}

func difference(want, have state) string {
	var b strings.Builder
	for path, w := range want {
		if h, ok := have[path]; h != w {
			if !ok {
				h = "(missing)"
			}
			fmt.Fprintf(&b, "%q\n  containerd %s\n  ours       %s\n", path, w, h)
		}
	}
	for path, h := range have {
		if _, ok := want[path]; !ok {
			fmt.Fprintf(&b, "%q\n  containerd (missing)\n  ours       %s\n", path, h)
		}
	}
	return b.String()
}

var kinds = map[Whiteouts][]archive.ApplyOpt{
	Mark:   {archive.WithConvertWhiteout(archive.OverlayConvertWhiteout)},
	Remove: nil,
}

// accepted counts the tars that compare has found to be taken.
var accepted atomic.Int64

// compare applies tars, one after another into one directory, with containerd's applier and
// with ours. Both must take or refuse each, and make the same trees, with nothing
// beside them.
func compare(t testing.TB, prepare func(root string), tars ...[]byte) {
	t.Helper()
	for kind, opts := range kinds {
		since := time.Now().Add(-time.Second)
		base := t.TempDir()
		theirs, ours := filepath.Join(base, "a", "fs"), filepath.Join(base, "b", "fs")
		for _, root := range []string{theirs, ours} {
			treetest.Check(t, errors.Join(os.MkdirAll(root, 0o755), os.Chmod(filepath.Dir(root), 0o755), os.Chmod(root, 0o755)))
			if prepare != nil {
				prepare(root)
			}
		}
		for n, layer := range tars {
			_, want := archive.Apply(t.Context(), theirs, bytes.NewReader(layer), opts...)
			r, err := Apply(t.Context(), Options{Dir: ours, Tar: bytes.NewReader(layer), Whiteouts: kind, Digests: true})
			if (want == nil) != (err == nil) {
				t.Fatalf("whiteouts %d, tar %d: containerd: %v\nours: %v", kind, n, want, err)
			}
			if err != nil {
				if found, err := os.ReadDir(filepath.Dir(ours)); err != nil || len(found) != 1 {
					t.Errorf("whiteouts %d, tar %d: beside the tree is %v, %v", kind, n, found, err)
				}
				break
			}
			accepted.Add(1)
			if is := digest.FromBytes(layer); r.DiffID != is || r.Size != int64(len(layer)) {
				t.Errorf("diff ID %s of %d bytes, want %s of %d", r.DiffID, r.Size, is, len(layer))
			}
			if text := difference(stateOf(t, filepath.Dir(theirs), since), stateOf(t, filepath.Dir(ours), since)); text != "" {
				t.Errorf("whiteouts %d, tar %d:\n%s", kind, n, text)
			}
			checkSums(t, ours, r.Sums)
		}
		treetest.Check(t, os.RemoveAll(base))
	}
}

// checkSums compares the digests with the content of files that have one.
func checkSums(t testing.TB, root string, sums map[uint64]Sum) {
	t.Helper()
	found := 0
	treetest.Check(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		var st unix.Stat_t
		treetest.Check(t, unix.Lstat(path, &st))
		sum, ok := sums[st.Ino]
		if !ok {
			return nil
		}
		found++
		body, err := os.ReadFile(path)
		if sum.Size != int64(len(body)) || sum.SHA256 != sha256.Sum256(body) {
			t.Errorf("%s: its digest is that of other content", path)
		}
		return err
	}))
	if found < len(sums)-removedFiles {
		t.Errorf("%d digests, and %d files that have one", len(sums), found)
	}
}

// removedFiles bounds the files of a test's tar that a later entry removes.
const removedFiles = 300

func repeat(n int, make func(i int) []item) (all []item) {
	for i := range n {
		all = append(all, make(i)...)
	}
	return all
}

// acl is an access control list in the kernel's format (acl(5)): it gives user 1000 all, and
// the mask and the others what mask and other are.
func acl(mask, other byte) string {
	b := []byte{2, 0, 0, 0}
	entry := func(tag, perm byte, id uint32) {
		b = append(b, tag, 0, perm, 0, byte(id), byte(id>>8), byte(id>>16), byte(id>>24))
	}
	const none = 1<<32 - 1
	entry(1, 7, none)
	entry(2, 7, 1000)
	entry(4, 5, none)
	entry(0x10, mask, none)
	entry(0x20, other, none)
	return string(b)
}

// capability is the value of security.capability with cap_net_bind_service (capabilities(7)).
const capability = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

var long = strings.Repeat("n", 255)

// layersOfEveryKind are tars that a careless applier trips over; the names say why.
var layersOfEveryKind = map[string][]item{
	"empty":                       {},
	"plain":                       {dirItem("etc", 0o755), fileItem("etc/file", "text"), symlinkItem("link", "etc/file"), hardlinkItem("hard", "etc/file")},
	"parents without entries":     {fileItem("a/b/c/file", "x"), dirItem("a/b", 0o700), fileItem("d/e", "y")},
	"directory after its content": {fileItem("d/file", "x"), dirItem("d", 0o511)},
	"the same path twice":         {fileItem("f", "one"), fileItem("f", "second"), fileItem("g", "x"), fileItem("g", "")},
	"path with two kinds": {
		fileItem("a", "x"), dirItem("a", 0o755), fileItem("a/in", "y"), symlinkItem("a", "gone"), fileItem("a", "z"),
		dirItem("b", 0o755), fileItem("b/c/d", "x"), fileItem("b", "file"), dirItem("c", 0o700), symlinkItem("c", "b"),
	},
	"directory replaced by a link to a directory": {dirItem("d", 0o700), dirItem("e", 0o755), symlinkItem("d", "e"), fileItem("d/through", "x")},
	"link replaced by a directory":                {dirItem("e", 0o755), symlinkItem("d", "e"), dirItem("d", 0o700), fileItem("d/in", "x")},
	"directory removed and made again":            {dirItem("d", 0o700), fileItem("d", "x"), dirItem("d", 0o711).with(func(h *tar.Header) { h.ModTime = time.Unix(5, 5) })},
	"time of a directory that is a file now":      {dirItem("d", 0o700).with(func(h *tar.Header) { h.ModTime = time.Unix(77, 0) }), fileItem("d", "x")},
	"time of a directory that is a link now":      {dirItem("e", 0o755), dirItem("d", 0o700).with(func(h *tar.Header) { h.ModTime = time.Unix(77, 0) }), symlinkItem("d", "e")},
	"time of a directory that is gone": {
		dirItem("d", 0o700), dirItem("d/e", 0o700), fileItem("d", "x"),
	},
	"through links": {
		dirItem("usr/bin", 0o755), symlinkItem("bin", "usr/bin"), fileItem("bin/sh", "x"), symlinkItem("abs", "/usr/bin"), fileItem("abs/ls", "y"),
		symlinkItem("up", "../../.."), fileItem("up/out", "z"), dirItem("up/dir", 0o700), symlinkItem("dangling", "not/there"), fileItem("dangling/file", "made"),
		symlinkItem("chain", "bin"), dirItem("chain/deep", 0o700), symlinkItem("usr/bin/back", "../../usr"), fileItem("chain/back/f", "x"),
	},
	"link of a directory's path changes": {
		dirItem("x/d", 0o755), dirItem("y/d", 0o755), symlinkItem("l", "x"),
		dirItem("l/d", 0o700).with(func(h *tar.Header) { h.ModTime = time.Unix(9, 0) }), symlinkItem("l", "y"),
	},
	"link of a directory's path is gone": {dirItem("x/d", 0o755), symlinkItem("l", "x"), dirItem("l/d", 0o700), fileItem("l", "")},
	"links in a circle":                  {symlinkItem("a", "b"), symlinkItem("b", "a"), fileItem("a/x", "")},
	"link to itself":                     {symlinkItem("a", "a"), dirItem("a/x", 0o755)},
	"many links":                         repeat(200, func(i int) []item { return []item{symlinkItem(fmt.Sprint("l", i+1), fmt.Sprint("l", i))} }),
	"below many links": append(repeat(250, func(i int) []item { return []item{symlinkItem(fmt.Sprint("l", i+1), fmt.Sprint("l", i))} }),
		dirItem("l0", 0o755), fileItem("l250/file", "x")),
	"below too many links": append(repeat(260, func(i int) []item { return []item{symlinkItem(fmt.Sprint("l", i+1), fmt.Sprint("l", i))} }),
		dirItem("l0", 0o755), fileItem("l260/file", "x")),
	"hostile names": {
		fileItem("../../out", "x"), fileItem("/absolute", "x"), fileItem("a/../../b", "x"), dirItem("..", 0o700), dirItem(".", 0o700), dirItem("/", 0o711),
		fileItem("./dot", "x"), fileItem("x//y", "z"), fileItem("...", "x"), fileItem(" ", "x"), fileItem("new\nline", "x"), fileItem("tab\t\x01", "x"),
	},
	"name of nothing":      {fileItem("", "x")},
	"invalid UTF-8":        {fileItem("\xff\xfe", "x").with(gnu), dirItem("\x80", 0o755).with(gnu), fileItem("\x80/\xc3\x28", "y").with(gnu), symlinkItem("s", "\xff").with(gnu)},
	"longest name":         {fileItem(long, "x"), fileItem(long+"/in", "x")},
	"long name":            {fileItem(long, "x"), dirItem("d", 0o755), fileItem("d/"+long, "y")},
	"too long a name":      {fileItem(long+"x", "x")},
	"too long a directory": {fileItem(long+"x/y", "x")},
	"long path":            {fileItem(strings.Repeat(long[:100]+"/", 35)+"file", "x")},
	"too long a path":      {fileItem(strings.Repeat(long+"/", 17)+"file", "x")},
	"too long a path in steps": {
		dirItem(strings.Repeat(long+"/", 8)+"d", 0o755), fileItem(strings.Repeat(long+"/", 8)+strings.Repeat(long+"/", 8)+"file", "x"),
	},
	"deep":                         {dirItem(strings.Repeat("d/", 300)+"end", 0o700), fileItem(strings.Repeat("d/", 300)+"end/file", "x"), fileItem(strings.Repeat("d/", 30)+"file", "y")},
	"below a file":                 {fileItem("f", "x"), fileItem("f/g", "y")},
	"below a file, deeper":         {fileItem("f", "x"), fileItem("f/g/h", "y")},
	"directory below a file":       {fileItem("f", "x"), dirItem("f/g", 0o755)},
	"hard links":                   {fileItem("d/f", "x"), hardlinkItem("g", "d/f").with(func(h *tar.Header) { h.Uid, h.Mode, h.ModTime = 5, 0o4711, time.Unix(3, 0) }), hardlinkItem("d/h", "g")},
	"hard link that is missing":    {hardlinkItem("g", "not/there")},
	"hard link to a later file":    {hardlinkItem("g", "f"), fileItem("f", "x")},
	"hard link to a removed file":  {fileItem("f", "x"), hardlinkItem("g", "f"), dirItem("f", 0o755)},
	"hard link to a replaced file": {fileItem("f", "x"), hardlinkItem("g", "f"), fileItem("f", "second")},
	"hard link to itself":          {fileItem("f", "x"), hardlinkItem("f", "f")},
	"hard link over another file":  {fileItem("f", "x"), fileItem("g", "y"), hardlinkItem("g", "f")},
	"hard link over its directory": {fileItem("d/f", "x"), hardlinkItem("d", "d/f")},
	"hard link to a directory":     {dirItem("d", 0o755), hardlinkItem("g", "d")},
	"hard link to the root":        {hardlinkItem("g", "/")},
	"hard link to nothing":         {hardlinkItem("g", ".")},
	"hard link out of the root":    {fileItem("f", "x"), hardlinkItem("g", "../../f"), hardlinkItem("h", "/f"), hardlinkItem("i", "./a/../f")},
	"hard link to what is above":   {hardlinkItem("g", "..")},
	"hard link through a link":     {dirItem("d", 0o755), fileItem("d/f", "x"), symlinkItem("l", "d"), hardlinkItem("g", "l/f"), hardlinkItem("l/h", "d/f")},
	"hard link to a link":          {symlinkItem("l", "nowhere"), hardlinkItem("g", "l").with(func(h *tar.Header) { h.Uid = 7 })},
	"hard link above a link":       {dirItem("d/e", 0o755), fileItem("d/f", "in d"), fileItem("f", "in the root"), symlinkItem("l", "d/e"), hardlinkItem("g", "l/../f"), hardlinkItem("h", "l/x/../../f")},
	"hard link with odd spelling":  {fileItem("d/f", "x"), symlinkItem("l", "d/f"), hardlinkItem("g", "d//f"), hardlinkItem("h", "./d/./f"), hardlinkItem("i", "d/f/."), hardlinkItem("j", "l/")},
	"hard link to a device":        {item{Header: tar.Header{Typeflag: tar.TypeChar, Name: "null", Mode: 0o666, Devmajor: 1, Devminor: 3}}, hardlinkItem("g", "null")},
	"hard link and capabilities":   {fileItem("f", "x").xattr("security.capability", capability), hardlinkItem("g", "f").with(func(h *tar.Header) { h.Mode = 0o755 })},
	"many hard links": append([]item{fileItem("f", "x")}, repeat(300, func(i int) []item {
		return []item{hardlinkItem(fmt.Sprint("d/", i), "f"), fileItem(fmt.Sprint("e/", i), "y")}
	})...),
	"whiteouts":                            {fileItem("a/.wh.b", ""), fileItem(".wh.c", "").with(func(h *tar.Header) { h.Uid, h.Gid = 5, 6 }), fileItem("d/.wh..wh..opq", ""), fileItem("d/e", "x")},
	"whiteout of the root":                 {fileItem("a/b", "x"), fileItem(".wh..wh..opq", ""), fileItem("c", "")},
	"whiteout before its name":             {fileItem(".wh.a", ""), fileItem("a", "x"), fileItem(".wh.d", ""), dirItem("d", 0o755), fileItem("d/f", "")},
	"whiteout after its name":              {fileItem("a", "x"), fileItem(".wh.a", "")},
	"whiteout after its directory":         {dirItem("a", 0o700), fileItem("a/b", ""), fileItem(".wh.a", "")},
	"whiteout after an invented directory": {fileItem("a/b/c", ""), fileItem("a/.wh.b", "")},
	"whiteout twice":                       {fileItem(".wh.a", ""), fileItem(".wh.a", "")},
	"opaque twice":                         {fileItem("a/.wh..wh..opq", ""), fileItem("a/b", "x"), fileItem("a/.wh..wh..opq", "")},
	"opaque twice, and invented between":   {fileItem("a/.wh..wh..opq", ""), fileItem("a/b/c", "x"), fileItem("a/.wh..wh..opq", "")},
	"opaque after its content":             {dirItem("a", 0o700), fileItem("a/b", "x"), fileItem("a/c/d", "y"), dirItem("a/e", 0o711), fileItem("a/e/f/g", ""), fileItem("a/.wh..wh..opq", ""), fileItem("a/c/new", "z")},
	"opaque with a body":                   {fileItem("a/.wh..wh..opq", "body"), fileItem("a/.wh.b", "body")},
	"opaque file":                          {fileItem("a", "x"), fileItem("a/.wh..wh..opq", "")},
	"whiteout of a whiteout":               {fileItem(".wh..wh.x", ""), fileItem("d/.wh..wh.plnk", "")},
	"whiteout of nothing":                  {fileItem("d/.wh.", "")},
	"whiteout of .":                        {fileItem("d/.wh..", "")},
	"whiteout of ..":                       {fileItem("d/.wh...", "")},
	"whiteout as a hard link":              {fileItem("f", "x"), hardlinkItem(".wh.g", "f"), hardlinkItem("d/.wh.h", "missing")},
	"whiteout as a directory":              {dirItem(".wh.d", 0o755), dirItem("d/.wh..wh..opq", 0o755)},
	"below a whiteout":                     {fileItem(".wh.d", ""), fileItem("d/f", "x")},
	"below a name like a whiteout":         {fileItem(".wh.d/f", "x")},
	"whiteout through a link":              {dirItem("d", 0o755), symlinkItem("l", "d"), fileItem("l/.wh.x", ""), fileItem("l/.wh..wh..opq", "")},
	"hard link to a whiteout":              {fileItem(".wh.a", ""), hardlinkItem("b", "a")},
	"whiteout as a device":                 {item{Header: tar.Header{Typeflag: tar.TypeChar, Name: "w", Mode: 0o600}}, fileItem("w", "x"), item{Header: tar.Header{Typeflag: tar.TypeChar, Name: "v"}}},
	"times": {
		fileItem("before", "").with(func(h *tar.Header) { h.ModTime = time.Unix(-1, 0) }), fileItem("long before", "").with(func(h *tar.Header) { h.ModTime = time.Unix(-1<<40, 5) }),
		fileItem("zero", "").with(func(h *tar.Header) { h.ModTime = time.Unix(0, 0) }), fileItem("late", "").with(func(h *tar.Header) { h.ModTime = time.Unix(9_000_000_000, 7) }),
		fileItem("too late", "").with(func(h *tar.Header) { h.ModTime = time.Unix(1<<40, 0) }), dirItem("dir", 0o755).with(func(h *tar.Header) { h.ModTime = time.Unix(-7, 0) }),
		symlinkItem("link", "x").with(func(h *tar.Header) { h.ModTime = time.Unix(12, 34) }),
		fileItem("accessed", "").with(func(h *tar.Header) { h.AccessTime = time.Unix(1_600_000_000, 1) }), fileItem("accessed before", "").with(func(h *tar.Header) { h.AccessTime = time.Unix(1, 1) }),
	},
	"modes": append(repeat(12, func(i int) []item {
		bit := int64(1) << i
		return []item{fileItem(fmt.Sprint("f", i), "x").with(func(h *tar.Header) { h.Mode = bit }), dirItem(fmt.Sprint("d", i), bit),
			fileItem(fmt.Sprint("o", i), "x").with(func(h *tar.Header) { h.Mode, h.Uid, h.Gid = bit|0o111, 3, 4 })}
	}), fileItem("all", "").with(func(h *tar.Header) { h.Mode = 0o7777 }), dirItem("every", 0o7777), fileItem("type bits", "").with(func(h *tar.Header) { h.Mode = 0o100644 })),
	"owners": {
		fileItem("big", "").with(func(h *tar.Header) { h.Uid, h.Gid = 4_000_000_000, 3_000_000_000 }), fileItem("one", "").with(func(h *tar.Header) { h.Gid = 1 }),
		symlinkItem("link", "x").with(func(h *tar.Header) { h.Uid = 1 }), dirItem("dir", 0o755).with(func(h *tar.Header) { h.Uid = 9 }), fileItem("dir/f", ""),
	},
	"setgid directories": {
		dirItem("d", 0o2755).with(func(h *tar.Header) { h.Gid = 50 }), fileItem("d/f", "x"), dirItem("d/sub", 0o755), fileItem("d/invented/f", "x"), dirItem("d/own", 0o2750).with(func(h *tar.Header) { h.Gid = 60 }),
		symlinkItem("d/link", "x"), fileItem("d/.wh.gone", ""), item{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "d/pipe", Mode: 0o600}}, fileItem("d/exec", "x").with(func(h *tar.Header) { h.Mode = 0o2755 }),
	},
	"default access control lists": {
		dirItem("d", 0o755).xattr("system.posix_acl_default", acl(5, 0)), fileItem("d/f", "x"), dirItem("d/sub", 0o777), fileItem("d/invented/f", "x"), fileItem("d/sub/f", "").with(func(h *tar.Header) { h.Mode = 0o666 }),
		item{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "d/pipe", Mode: 0o622}}, symlinkItem("d/link", "x"), fileItem("d/.wh.gone", ""),
		fileItem("own", "x").xattr("system.posix_acl_access", acl(4, 4)).with(func(h *tar.Header) { h.Mode = 0o640 }),
	},
	"extended attributes": {
		fileItem("f", "x").xattr("user.one", "1").xattr("user.two", "").xattr("security.capability", capability),
		dirItem("d", 0o755).xattr("user.dir", "a\x00b"), fileItem("t", "x").xattr("trusted.overlay.opaque", "y"), dirItem("o", 0o755).xattr("user.overlay.opaque", "y"),
		fileItem("s", "x").xattr("security.selinux", "label"), symlinkItem("l", "x").xattr("user.link", "1"), symlinkItem("m", "x").xattr("security.selinux", "label"),
		item{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "p", Mode: 0o600}}.xattr("user.pipe", "1"), fileItem("n", "x").xattr("nonsense.name", "1"),
	},
	"attribute without a name":  {fileItem("f", "x").xattr("", "1")},
	"too large an attribute":    {fileItem("f", "x").xattr("user.big", strings.Repeat("v", 1<<16+1))},
	"attribute that is invalid": {fileItem("f", "x").xattr("security.capability", "short")},
	"capability and setuid":     {fileItem("f", "x").xattr("security.capability", capability).with(func(h *tar.Header) { h.Mode, h.Uid = 0o6755, 1 })},
	"attributes on a directory that is there": {
		fileItem("d/f", "x"), dirItem("d", 0o700).xattr("user.a", "1").with(func(h *tar.Header) { h.Uid = 3 }), dirItem("d", 0o711).xattr("user.b", "2"),
	},
	"devices": {
		item{Header: tar.Header{Typeflag: tar.TypeChar, Name: "null", Mode: 0o666, Devmajor: 1, Devminor: 3}}, item{Header: tar.Header{Typeflag: tar.TypeBlock, Name: "disk", Mode: 0o660, Gid: 6, Devmajor: 259, Devminor: 70000}},
		item{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "pipe", Mode: 0o4622}}, item{Header: tar.Header{Typeflag: tar.TypeChar, Name: "large", Devmajor: 1 << 20, Devminor: 1 << 30, Format: tar.FormatGNU}},
	},
	"device out of range":  {item{Header: tar.Header{Typeflag: tar.TypeChar, Name: "x", Devmajor: 1 << 33, Format: tar.FormatGNU}}},
	"global header":        {fileItem("keep", "x"), item{Header: tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "pax_global_header", PAXRecords: map[string]string{"comment": "x"}}}, fileItem("f", "x")},
	"global header's name": {fileItem("d/name", "x"), item{Header: tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "d/name", PAXRecords: map[string]string{"comment": "x"}}}},
	"unknown type":         {item{Header: tar.Header{Typeflag: '7', Name: "x", Format: tar.FormatUSTAR, ModTime: time.Unix(1, 0)}}},
	"size of nothing":      {fileItem("a", ""), fileItem("b", "")},
	"sizes": repeat(40, func(i int) []item {
		n := []int{0, 1, 511, 512, 513, 4096, early - 1, early, blockSize - 1, blockSize, blockSize + 1, 3 * blockSize, 3*blockSize + 7}[i%13]
		return []item{fileItem(fmt.Sprintf("d/%d", i), strings.Repeat(string(rune('a'+i%26)), n))}
	}),
	"bigger than what is written at a time": {fileItem("big", strings.Repeat("0123456789abcdef", 2*earlyBytes/16)), fileItem("more", strings.Repeat("x", earlyBytes+1)), fileItem("big", "now small")},
	"more directories than are open": append(repeat(openDirs+50, func(i int) []item {
		return []item{dirItem(fmt.Sprintf("d%d/sub", i), 0o750), fileItem(fmt.Sprintf("d%d/sub/f", i), "x")}
	}), repeat(openDirs+50, func(i int) []item {
		return []item{fileItem(fmt.Sprintf("d%d/sub/g", i), "y"), hardlinkItem(fmt.Sprintf("d%d/h", i), fmt.Sprintf("d%d/sub/f", openDirs+49-i))}
	})...),
}

func gnu(h *tar.Header) { h.Format = tar.FormatGNU; h.ModTime = time.Unix(1_500_000_000, 0) }

// TestAsContainerd: a tar of every kind becomes the same tree, or is refused, as with
// containerd's applier.
func TestAsContainerd(t *testing.T) {
	root(t)
	for name, items := range layersOfEveryKind {
		t.Run(name, func(t *testing.T) { compare(t, nil, tarOf(t, items...)) })
	}
}

// TestAsContainerdAgain: the same for a directory in which something is already.
func TestAsContainerdAgain(t *testing.T) {
	root(t)
	inMemory(t)
	before := tarOf(t, dirItem("d", 0o2775), fileItem("d/f", "before"), dirItem("a/b/c", 0o700), fileItem("a/b/c/f", "before"), symlinkItem("l", "d"), symlinkItem("dangling", "not/there"),
		fileItem("f", "before"), hardlinkItem("g", "f"), dirItem("e/f", 0o755), symlinkItem("bin", "usr/bin"), dirItem("x/y", 0o711))
	for name, items := range layersOfEveryKind {
		t.Run(name, func(t *testing.T) { compare(t, nil, before, tarOf(t, items...)) })
	}
}

// TestAround: what is around the tree, and the mask of the process, does not show in it.
func TestAround(t *testing.T) {
	root(t)
	inMemory(t)
	for name, prepare := range map[string]func(string){
		"setgid": func(root string) { treetest.Check(t, errors.Join(os.Chown(root, 7, 8), unix.Chmod(root, 0o2775))) },
		"default": func(root string) {
			treetest.Check(t, unix.Setxattr(root, "system.posix_acl_default", []byte(acl(1, 0)), 0))
		},
		"umask": func(string) { unix.Umask(0o077) },
	} {
		before := unix.Umask(0o022)
		for kind, items := range layersOfEveryKind {
			t.Run(name+"/"+kind, func(t *testing.T) { compare(t, prepare, tarOf(t, items...)) })
		}
		unix.Umask(before)
	}
}

// TestCutShort: a tar that ends anywhere, or is altered, is refused as containerd refuses it.
func TestCutShort(t *testing.T) {
	root(t)
	whole := tarOf(t, dirItem("d", 0o755), fileItem("d/f", strings.Repeat("x", 700)), fileItem("g", strings.Repeat("y", blockSize+100)), symlinkItem("l", "d"))
	for _, n := range []int{0, 1, 511, 512, 513, 1024, 1500, 2048, 2600, 3072, 4000, 10_000, blockSize, len(whole) - 1600, len(whole) - 1024, len(whole) - 512, len(whole) - 1} {
		t.Run(fmt.Sprint(n), func(t *testing.T) { compare(t, nil, whole[:n]) })
	}
	for _, n := range []int{0, 100, 148, 156, 257, 512, 1024 + 124, 1024 + 156} {
		t.Run(fmt.Sprint("altered at ", n), func(t *testing.T) {
			altered := slices.Clone(whole)
			altered[n] ^= 0x11
			compare(t, nil, altered)
		})
	}
	t.Run("more behind it", func(t *testing.T) { compare(t, nil, append(slices.Clone(whole), strings.Repeat("z", 3*blockSize)...)) })
}

// inMemory has the test's directories in memory, where trees are made and removed faster.
func inMemory(t testing.TB) {
	t.Helper()
	var st unix.Statfs_t
	if unix.Statfs(os.TempDir(), &st) == nil && st.Type == unix.TMPFS_MAGIC {
		return // of the process that fuzzes, in one of its workers
	}
	mnt := t.TempDir()
	treetest.Check(t, unix.Mount("tmpfs", mnt, "tmpfs", 0, ""))
	t.Cleanup(func() { treetest.Check(t, unix.Unmount(mnt, 0)) })
	t.Setenv("TMPDIR", mnt)
}

// root skips a test that makes devices and owners.
func root(t testing.TB) {
	if os.Geteuid() != 0 {
		t.Skip("devices and owners need root")
	}
}

// TestContentDigests: the digests are those of the content, for every file, so that no file
// has to be read for the list of them.
func TestContentDigests(t *testing.T) {
	root(t)
	for _, name := range []string{"plain", "the same path twice", "hard link to a replaced file", "many hard links", "sizes", "bigger than what is written at a time"} {
		dir, lists := t.TempDir(), t.TempDir()
		r, err := Apply(t.Context(), Options{Dir: dir, Tar: bytes.NewReader(tarOf(t, layersOfEveryKind[name]...)), Digests: true})
		treetest.Check(t, err)
		read, err := contents.Write(t.Context(), dir, filepath.Join(lists, "read"), contents.Reading{})
		treetest.Check(t, err)
		list, err := contents.NewList(dir, filepath.Join(lists, "known"), func(inode uint64, size int64) ([32]byte, bool) {
			sum, ok := r.Sums[inode]
			if !ok || sum.Size != size {
				t.Errorf("%s: a file of %d bytes has no digest", name, size)
			}
			return sum.SHA256, ok
		}, nil)
		treetest.Check(t, err)
		_, err = seal.ChangeAndWrite(t.Context(), dir, filepath.Join(lists, "seal"), nil, nil, func(e *seal.Entry) error { return list.Add(t.Context(), e.Path, &e.Stat) })
		treetest.Check(t, err)
		known, err := list.Close()
		treetest.Check(t, err)
		if read != known {
			t.Errorf("%s: the lists of digests differ", name)
		}
	}
}

// TestSparse: files with holes, as GNU tar packs them, in all its formats.
func TestSparse(t *testing.T) {
	root(t)
	if _, err := exec.LookPath("tar"); err != nil {
		t.Skip("tar is not installed")
	}
	inMemory(t)
	dir := t.TempDir()
	for name, size := range map[string]int64{"all hole": 3 << 20, "small": 70_000, "large": 40 << 20} {
		f, err := os.Create(filepath.Join(dir, name))
		treetest.Check(t, err)
		treetest.Check(t, f.Truncate(size))
		if name != "all hole" {
			for _, off := range []int64{0, size / 2, size - 5} {
				_, err := f.WriteAt([]byte("data"), off)
				treetest.Check(t, err)
			}
		}
		treetest.Check(t, f.Close())
	}
	for _, format := range [][]string{{"--format=gnu"}, {"--format=posix", "--sparse-version=0.0"}, {"--format=posix", "--sparse-version=0.1"}, {"--format=posix", "--sparse-version=1.0"}} {
		t.Run(strings.Join(format, " "), func(t *testing.T) {
			layer, err := exec.Command("tar", append(format, "-C", dir, "--sparse", "-cf", "-", ".")...).Output()
			treetest.Check(t, err)
			if len(layer) > 1<<20 {
				t.Fatalf("a tar of %d bytes: the holes are in it", len(layer))
			}
			compare(t, nil, layer)
		})
	}
}
