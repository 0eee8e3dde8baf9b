package boltcheck

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

// pagesOf are the pages of a database on which the tests work.
type pagesOf struct {
	b []byte // the file

	top       uint64 // the branch page at the top of the bucket journal/committed
	below     uint64 // a branch page below it
	journal   uint64 // the leaf page that is the bucket journal
	committed uint64 // offset of the value that has the page of journal/committed
	freelist  uint64
	root      uint64 // page of the bucket of the whole file
}

func (p *pagesOf) page(id uint64) []byte { return p.b[id*pageSize:] }

// child is the number of a branch page's child; index may be negative, from the
// end.
func (p *pagesOf) child(id uint64, index int) []byte {
	count := int(binary.NativeEndian.Uint16(p.page(id)[10:]))
	if index < 0 {
		index += count
	}
	return p.page(id)[pageHeader+index*pageElement+8:]
}

const (
	pageSize = 4096
	fileName = "bolt.db"
)

var errDamaged = errors.New("the file is damaged")

func put64(b []byte, n uint64) { binary.NativeEndian.PutUint64(b, n) }

// The buckets of the databases of the tests.
var (
	bucketJournal   = []byte("journal")
	bucketCommitted = []byte("committed")
	bucketHistory   = []byte("history")
)

// fill puts a number of values into the bucket journal/committed of a new database, beside
// two empty buckets and a value, and returns the page numbers of journal and of committed.
func fill(t testing.TB, path string, values int) (journal, committed uint64) {
	t.Helper()
	db, err := bolt.Open(path, 0o600, &bolt.Options{PageSize: pageSize})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second transaction leaves free pages
		if err := db.Update(func(tx *bolt.Tx) error {
			// A second bucket: a bucket that loses its only element is a valid empty one.
			if _, err := tx.CreateBucketIfNotExists([]byte("v1")); err != nil {
				return err
			}
			j, err := tx.CreateBucketIfNotExists(bucketJournal)
			if err != nil {
				return err
			}
			b, err := j.CreateBucketIfNotExists(bucketCommitted)
			for id := range uint64(values) {
				if err == nil {
					err = b.Put(binary.BigEndian.AppendUint64(nil, id), fmt.Appendf(nil, "layer-%0200d", id))
				}
			}
			if err != nil {
				return err
			}
			for _, name := range [][]byte{bucketHistory, []byte("open")} {
				if _, err := j.CreateBucketIfNotExists(name); err != nil {
					return err
				}
			}
			return j.Put([]byte("run"), []byte("value"))
		}); err != nil {
			t.Fatal(err)
		}
	}
	if err := db.View(func(tx *bolt.Tx) error {
		j := tx.Bucket(bucketJournal)
		journal, committed = uint64(j.Root()), uint64(j.Bucket(bucketCommitted).Root())
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	return journal, committed
}

// manyPages makes a database whose bucket journal/committed is three pages deep.
func manyPages(t *testing.T) (path string, p *pagesOf) {
	t.Helper()
	path = filepath.Join(t.TempDir(), fileName)
	p = &pagesOf{}
	p.journal, p.top = fill(t, path, 4000)
	var err error
	if p.b, err = os.ReadFile(path); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m, err := readMeta(f, int64(len(p.b)), errDamaged)
	if err != nil {
		t.Fatal(err)
	}
	p.freelist, p.root = m.freelist, m.root
	p.below = binary.NativeEndian.Uint64(p.child(p.top, 0))
	if flags := binary.NativeEndian.Uint16(p.page(p.below)[8:]); flags != branchPage {
		t.Fatalf("page %d has flags %#x: the bucket is not deep enough", p.below, flags)
	}
	at := bytes.Index(p.page(p.journal), bucketCommitted)
	p.committed = p.journal*pageSize + uint64(at+len(bucketCommitted))
	if root := binary.NativeEndian.Uint64(p.b[p.committed:]); root != p.top {
		t.Fatalf("journal/committed is at page %d, its value is %d", p.top, root)
	}
	return path, p
}

// checkBytes is Check of a file with content b.
func checkBytes(t *testing.T, path string, b []byte) error {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return Check(f, errDamaged)
}

// TestPagesThatContradict: damage that bbolt would read without a word, and some
// of it would destroy what is whole at the next write.
func TestPagesThatContradict(t *testing.T) {
	_, healthy := manyPages(t)
	leaf := func(p *pagesOf) uint64 { return binary.NativeEndian.Uint64(p.child(p.below, 0)) }
	for name, c := range map[string]struct {
		damage func(*pagesOf)
		want   string
	}{
		"a page in use is listed as free": {func(p *pagesOf) {
			put64(p.page(p.freelist)[pageHeader:], leaf(p))
		}, "in use twice"},
		"a page is free twice": {func(p *pagesOf) {
			ids := p.page(p.freelist)[pageHeader:]
			copy(ids, ids[8:16])
		}, "in use twice"},
		"a meta page is free":            {func(p *pagesOf) { put64(p.page(p.freelist)[pageHeader:], 1) }, "in use twice"},
		"a free page beyond the file":    {func(p *pagesOf) { put64(p.page(p.freelist)[pageHeader:], 1<<40) }, "beyond"},
		"the list of free pages is none": {func(p *pagesOf) { p.page(p.freelist)[8] = leafPage }, "list of free pages"},
		"two buckets share their pages": {func(p *pagesOf) {
			page := p.page(p.journal)
			put64(page[bytes.Index(page, bucketHistory)+len(bucketHistory):], p.top)
		}, "in use twice"},
		"a child beyond the file":            {func(p *pagesOf) { put64(p.child(p.below, 1), 1<<40) }, "outside"},
		"a child is the list of free pages":  {func(p *pagesOf) { put64(p.child(p.below, 1), p.freelist) }, "in use twice"},
		"a page overflows beyond the file":   {func(p *pagesOf) { p.page(leaf(p))[14] = 1 }, "beyond"},
		"a page overflows into the next one": {func(p *pagesOf) { p.page(leaf(p))[12] = 1 }, "in use twice"},
		"a leaf has the number of another page": {func(p *pagesOf) {
			put64(p.page(leaf(p)), leaf(p)+1)
		}, "it has the number"},
		"a leaf with fewer elements":   {func(p *pagesOf) { p.page(leaf(p))[10]-- }, "want them from"},
		"a leaf with too many":         {func(p *pagesOf) { p.page(leaf(p))[11] = 0xFF }, "do not fit"},
		"keys out of order":            {func(p *pagesOf) { swapKeys(p.page(leaf(p)), 0, 1) }, "after"},
		"a key of the next page":       {func(p *pagesOf) { key(p.page(leaf(p)), -1)[0] = 1 }, "begins on the next page"},
		"a bucket of a few bytes":      {func(p *pagesOf) { p.bucketElement()[12] = 3 }, "a bucket of 3 bytes"},
		"a bucket of the file a value": {func(p *pagesOf) { p.page(p.root)[pageHeader] = 0 }, "only buckets"},
		"a bucket with unknown flags":  {func(p *pagesOf) { p.bucketElement()[0] = 3 }, "flags 0x3"},
		"the file is a page too short": {func(p *pagesOf) { p.b = p.b[:p.end()-pageSize] }, "pages of"},
	} {
		t.Run(name, func(t *testing.T) {
			p := *healthy
			p.b = bytes.Clone(healthy.b)
			c.damage(&p)
			err := checkBytes(t, filepath.Join(t.TempDir(), fileName), p.b)
			if !errors.Is(err, errDamaged) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

// bucketElement is the element of the last bucket in the leaf page of journal.
func (p *pagesOf) bucketElement() []byte {
	page := p.page(p.journal)
	for i := int(binary.NativeEndian.Uint16(page[10:])) - 1; ; i-- {
		if e := page[pageHeader+i*pageElement:]; e[0] == 1 {
			return e
		}
	}
}

// end is the size of the file without what it has in reserve.
func (p *pagesOf) end() uint64 {
	return pageSize * max(binary.NativeEndian.Uint64(p.b[pageHeader+40:]), binary.NativeEndian.Uint64(p.b[pageSize+pageHeader+40:]))
}

// key returns the key of an element of a leaf page; index may be negative.
func key(page []byte, index int) []byte {
	if index < 0 {
		index += int(binary.NativeEndian.Uint16(page[10:]))
	}
	at := pageHeader + index*pageElement
	at += int(binary.NativeEndian.Uint32(page[at+4:]))
	return page[at : at+8]
}

func swapKeys(page []byte, i, j int) {
	a, b := key(page, i), key(page, j)
	for n := range a {
		a[n], b[n] = b[n], a[n]
	}
}

// TestFlippedBytesOfPages: each byte of the header of each page in use, and of the
// table of its elements, is noticed when it changes, but for those that bbolt
// gives nothing to compare with: how long the last element is, and whether a
// value is a bucket.
func TestFlippedBytesOfPages(t *testing.T) {
	path := filepath.Join(t.TempDir(), fileName)
	fill(t, path, 100)
	db, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	var tables []int // offsets in the file
	pages := 0
	if err := db.View(func(tx *bolt.Tx) error {
		for id := 2; ; id++ {
			info, err := tx.Page(id)
			if err != nil || info == nil {
				return err
			}
			if info.Type != "branch" && info.Type != "leaf" {
				continue
			}
			pages++
			for i := range pageHeader + info.Count*pageElement {
				of, last := (i-pageHeader)%pageElement, i >= pageHeader+(info.Count-1)*pageElement
				switch {
				case i < pageHeader:
				case info.Type == "leaf" && (of == 0 || last && of >= 8):
					continue
				case info.Type == "branch" && last && of >= 4 && of < 8:
					continue
				}
				tables = append(tables, id*pageSize+i)
			}
		}
	}); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if pages < 8 {
		t.Fatalf("only %d pages", pages)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := Check(f, errDamaged); err != nil {
		t.Fatal(err)
	}
	for _, at := range tables {
		for _, flip := range []byte{1, 0x80, 0xFF} {
			if _, err := f.WriteAt([]byte{whole[at] ^ flip}, int64(at)); err != nil {
				t.Fatal(err)
			}
			if err := Check(f, errDamaged); !errors.Is(err, errDamaged) {
				t.Errorf("page %d, byte %d, %#x for %#x: %v", at/pageSize, at%pageSize, whole[at]^flip, whole[at], err)
			}
		}
		if _, err := f.WriteAt(whole[at:at+1], int64(at)); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d bytes of %d pages", len(tables), pages)
}

// TestHealthyPages: no false alarm, whatever bbolt writes. Its own check of each
// database, which follows references without doubt, agrees.
func TestHealthyPages(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	for name, o := range map[string]*bolt.Options{
		"as containerd opens it": nil,
		"pages of 1 KiB":         {PageSize: 1 << 10},
		"pages of 64 KiB":        {PageSize: 64 << 10},
		"free pages not stored":  {NoFreelistSync: true},
		"free pages in a map":    {FreelistType: bolt.FreelistMapType},
	} {
		t.Run(name, func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 0))
			path := filepath.Join(t.TempDir(), fileName)
			db, err := bolt.Open(path, 0o600, o)
			if err != nil {
				t.Fatal(err)
			}
			db.NoSync = true // there is no power cut here
			defer db.Close()
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			for n := range 150 {
				if err := db.Update(func(tx *bolt.Tx) error { return scribble(tx, r) }); err != nil {
					t.Fatal(err)
				}
				if err := Check(f, errDamaged); err != nil {
					t.Fatalf("after transaction %d: %v", n, err)
				}
			}
			if err := db.View(func(tx *bolt.Tx) (all error) {
				for err := range tx.Check() {
					all = errors.Join(all, err)
				}
				return all
			}); err != nil {
				t.Errorf("bbolt itself: %v", err)
			}
		})
	}
}

// scribble changes a database at random: buckets in buckets, from empty ones to
// some of many pages, values from none to several pages, deletions.
func scribble(tx *bolt.Tx, r *rand.Rand) error {
	name := func(of int) []byte { return fmt.Appendf(nil, "bucket-%d", r.IntN(of)) }
	b, err := tx.CreateBucketIfNotExists(name(4))
	for depth := r.IntN(4); err == nil && depth > 0; depth-- {
		b, err = b.CreateBucketIfNotExists(name(6))
	}
	if err != nil {
		return err
	}
	switch r.IntN(8) {
	case 0: // most of what is in it
		c := b.Cursor()
		for k, v := c.First(); k != nil; k, v = c.Next() {
			if v == nil || r.IntN(10) == 0 {
				continue
			}
			if err := c.Delete(); err != nil {
				return err
			}
		}
		return nil
	case 1: // a bucket, with all below it
		if err := b.DeleteBucket(name(6)); err != nil && !errors.Is(err, berrors.ErrBucketNotFound) {
			return err
		}
		return nil
	case 2:
		if err := b.SetSequence(r.Uint64()); err != nil {
			return err
		}
	case 3:
		return b.Put([]byte("large"), make([]byte, r.IntN(300<<10)))
	}
	for range r.IntN(200) {
		if err := b.Put(fmt.Appendf(nil, "key-%0*d", 1+r.IntN(100), r.IntN(5000)), make([]byte, r.IntN(400))); err != nil {
			return err
		}
	}
	return nil
}

// BenchmarkCheck checks a database of 10 MB in the page cache.
func BenchmarkCheck(b *testing.B) {
	path := filepath.Join(b.TempDir(), fileName)
	db, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		b.Fatal(err)
	}
	if err := db.Update(func(tx *bolt.Tx) error {
		bucket, err := tx.CreateBucket([]byte("b"))
		if err != nil {
			return err
		}
		for i := range 16_000 {
			if err := bucket.Put(binary.BigEndian.AppendUint64(nil, uint64(i)), make([]byte, 300)); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		b.Fatal(err)
	}
	if err := db.Close(); err != nil {
		b.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(st.Size())
	b.ReportAllocs()
	for b.Loop() {
		if err := Check(f, errDamaged); err != nil {
			b.Fatal(err)
		}
	}
}
