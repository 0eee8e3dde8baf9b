// Package boltcheck validates a bbolt file before bbolt reads it.
//
// bbolt accepts every page that has the right number and one of the right flags. Its cursors follow a branch page that leads to itself until the memory
// of the machine is used up, and a length in its list of free pages is allocated
// without a check; neither is a panic that could be caught. [Check] reads the same bytes,
// and validates all of them.
//
// The package does not import bbolt: it depends on the format on disk only, and a change
// of that format has another version number in the file.
package boltcheck

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// The layout is that of bbolt's internal/common/{page,meta,bucket}.go. Numbers
// are in the byte order of the machine.
const (
	boltMagic   = 0xED0CDAED
	boltVersion = 2

	pageHeader   = 16 // id 8, flags 2, count 2, overflow 4
	pageElement  = 16 // branch: pos 4, ksize 4, page 8; leaf: flags 4, pos 4, ksize 4, vsize 4
	bucketHeader = 16 // root page 8, sequence 8
	metaSize     = 64 // its last eight bytes are its checksum

	branchPage   = 0x01
	leafPage     = 0x02
	freelistPage = 0x10

	noFreelist = ^uint64(0) // of a database that does not store it
)

// meta is the content of a meta page of bbolt.
type meta struct {
	pageSize            uint32
	root, freelist, end uint64 // end: pages from here on were never used
	transaction         uint64
}

// Check follows every reference between the pages of a bbolt file, from
// the meta page that bbolt would take, and reads no content but keys. Each page
// must be inside the file, and what its reference takes it for; its elements must
// stand in it one after the other, as bbolt writes them, with their keys in
// order; and no page may be referred to twice, not even by the list of free
// pages, or the next transaction would overwrite it.
//
// The error wraps damaged if the file is to blame, and is one of the operating system
// otherwise. A page that the disk cannot read is a fault in the memory map: the caller
// catches it (debug.SetPanicOnFault). The caller locks f, and closes it.
func Check(f *os.File, damaged error) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	m, err := readMeta(f, st.Size(), damaged)
	if err != nil {
		return err
	}
	pageSize := uint64(m.pageSize)
	if there := uint64(st.Size()) / pageSize; there < m.end {
		return fmt.Errorf("%d pages of %d: %w", there, m.end, damaged)
	}
	data, err := unix.Mmap(int(f.Fd()), 0, int(m.end*pageSize), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return &os.PathError{Op: "mmap", Path: f.Name(), Err: err}
	}
	g := pageGraph{damaged: damaged, data: data, pageSize: pageSize, pages: m.end, used: make([]uint64, m.end/64+1)}
	g.used[0] = 1<<0 | 1<<1 // the meta pages
	err = g.walk(m)
	if cause := unix.Munmap(data); cause != nil {
		err = errors.Join(err, &os.PathError{Op: "munmap", Path: f.Name(), Err: cause})
	}
	return err
}

// readMeta returns the newest meta page whose checksum is right, as bbolt does.
// The size of a page is in the meta pages themselves: the second one is
// tried at every size that bbolt knows.
func readMeta(f *os.File, size int64, damaged error) (newest meta, err error) {
	first, ok, err := readMetaAt(f, 0, damaged)
	if err != nil {
		return meta{}, err
	}
	pageSize := int64(first.pageSize)
	for guess := int64(1 << 10); pageSize == 0 && guess <= 16<<20 && guess < size; guess *= 2 {
		m, ok, err := readMetaAt(f, guess, damaged)
		if err != nil {
			return meta{}, err
		}
		if ok {
			pageSize = int64(m.pageSize)
		}
	}
	if pageSize == 0 {
		return meta{}, fmt.Errorf("no meta page is valid: %w", damaged)
	}
	second, ok2, err := readMetaAt(f, pageSize, damaged)
	switch {
	case err != nil:
		return meta{}, err
	case ok2 && (!ok || second.transaction > first.transaction):
		newest = second
	case ok:
		newest = first
	default:
		return meta{}, fmt.Errorf("no meta page is valid: %w", damaged)
	}
	if int64(newest.pageSize) != pageSize {
		return meta{}, fmt.Errorf("the meta pages disagree: pages of %d and of %d bytes: %w", pageSize, newest.pageSize, damaged)
	}
	return newest, nil
}

// readMetaAt reads the meta page at an offset; false when it is not valid.
func readMetaAt(f *os.File, offset int64, damaged error) (meta, bool, error) {
	b := make([]byte, metaSize)
	n, err := f.ReadAt(b, offset+pageHeader)
	if err != nil && err != io.EOF {
		return meta{}, false, fmt.Errorf("%w: %w", damaged, err)
	}
	sum := fnv.New64a()
	_, _ = sum.Write(b[:metaSize-8])
	order := binary.NativeEndian
	if n < metaSize || order.Uint32(b) != boltMagic || order.Uint32(b[4:]) != boltVersion || order.Uint64(b[metaSize-8:]) != sum.Sum64() {
		return meta{}, false, nil
	}
	m := meta{
		pageSize: order.Uint32(b[8:]), root: order.Uint64(b[16:]), freelist: order.Uint64(b[32:]),
		end: order.Uint64(b[40:]), transaction: order.Uint64(b[48:]),
	}
	if m.pageSize < 1<<10 || m.pageSize > 16<<20 || m.pageSize&(m.pageSize-1) != 0 {
		return meta{}, false, fmt.Errorf("pages of %d bytes: %w", m.pageSize, damaged)
	}
	return m, true, nil
}

// pageGraph is a file in the memory map, and what was seen of it.
type pageGraph struct {
	damaged  error // wrapped by errors about the file
	data     []byte
	pageSize uint64
	pages    uint64
	used     []uint64 // one bit a page, so that each is visited once
	todo     []reference
}

// reference is a page to visit, the page that refers to it, and the keys that it may
// have: from is the lowest, none is to or above; nil where there is no bound.
type reference struct {
	page, by uint64
	from, to []byte
	top      bool // of the bucket of the whole file, in which bbolt has nothing but buckets
}

// walk visits what the meta page refers to, without recursion. In a whole file
// each reference leads to another page, so that the list, and with it the memory
// in use, is bounded by the number of pages.
func (g *pageGraph) walk(m meta) error {
	if m.freelist != noFreelist {
		if err := g.freelist(m.freelist); err != nil {
			return err
		}
	}
	g.todo = append(g.todo, reference{page: m.root, top: true})
	for len(g.todo) > 0 {
		last := len(g.todo) - 1
		r := g.todo[last]
		g.todo = g.todo[:last]
		flags, count, page, err := g.take(r.page)
		if err == nil {
			switch flags {
			case branchPage:
				err = g.branch(r, count, page)
			case leafPage:
				err = g.leaf(r, count, page, false)
			default:
				err = fmt.Errorf("flags %#x, neither branch nor leaf", flags)
			}
		}
		if err != nil {
			return fmt.Errorf("page %d, of page %d: %w: %w", r.page, r.by, g.damaged, err)
		}
	}
	return nil
}

// take returns the bytes of a page, with those it overflows into, and marks them
// as used.
func (g *pageGraph) take(id uint64) (flags uint16, count int, page []byte, err error) {
	if id >= g.pages {
		return 0, 0, nil, fmt.Errorf("outside of the %d pages of the file", g.pages)
	}
	page = g.data[id*g.pageSize:]
	order := binary.NativeEndian
	if is := order.Uint64(page); is != id {
		return 0, 0, nil, fmt.Errorf("it has the number %d", is)
	}
	length := 1 + uint64(order.Uint32(page[12:]))
	if length > g.pages-id {
		return 0, 0, nil, fmt.Errorf("%d pages long, beyond the %d of the file", length, g.pages)
	}
	for i := id; i < id+length; i++ {
		if err := g.use(i); err != nil {
			return 0, 0, nil, err
		}
	}
	return order.Uint16(page[8:]), int(order.Uint16(page[10:])), page[:length*g.pageSize], nil
}

func (g *pageGraph) use(id uint64) error {
	if id >= g.pages {
		return fmt.Errorf("page %d is beyond the %d of the file", id, g.pages)
	}
	if g.used[id/64]&(1<<(id%64)) != 0 {
		return fmt.Errorf("page %d is in use twice", id)
	}
	g.used[id/64] |= 1 << (id % 64)
	return nil
}

// freelist marks the list of free pages and what is in it.
func (g *pageGraph) freelist(id uint64) error {
	flags, count, page, err := g.take(id)
	if err == nil && flags != freelistPage {
		err = fmt.Errorf("flags %#x", flags)
	}
	if err != nil {
		return fmt.Errorf("page %d, list of free pages: %w: %w", id, g.damaged, err)
	}
	ids := page[pageHeader:]
	number := uint64(count)
	if count == 0xFFFF { // the number does not fit there, and stands first
		number, ids = binary.NativeEndian.Uint64(ids), ids[8:]
	}
	if number > uint64(len(ids))/8 {
		return fmt.Errorf("page %d, list of free pages: %w: %d pages do not fit in it", id, g.damaged, number)
	}
	for ids = ids[:number*8]; len(ids) > 0; ids = ids[8:] {
		free := binary.NativeEndian.Uint64(ids)
		if err := g.use(free); err != nil {
			return fmt.Errorf("page %d, list of free pages: %w: %w", id, g.damaged, err)
		}
	}
	return nil
}

// branch adds the children of a branch page to the list.
func (g *pageGraph) branch(r reference, count int, page []byte) error {
	if count == 0 {
		return errors.New("a branch without children") // bbolt would read the first all the same
	}
	before, end := r.from, pageHeader+count*pageElement
	if end > len(page) {
		return fmt.Errorf("%d elements do not fit in it", count)
	}
	for i := range count {
		at := pageHeader + i*pageElement
		order := binary.NativeEndian
		key, _, err := content(page, at, &end, order.Uint32(page[at:]), order.Uint32(page[at+4:]), 0)
		if err == nil {
			err = r.ordered(before, key, i == 0)
		}
		if err == nil && i > 0 {
			g.todo[len(g.todo)-1].to = key
		}
		if err == nil {
			err = g.refer(reference{page: order.Uint64(page[at+8:]), by: r.page, from: key, to: r.to, top: r.top})
		}
		if err != nil {
			return fmt.Errorf("element %d: %w", i, err)
		}
		before = key
	}
	return nil
}

// refer puts a page on the list.
func (g *pageGraph) refer(r reference) error {
	if uint64(len(g.todo)) >= g.pages {
		return errors.New("more references than pages")
	}
	g.todo = append(g.todo, r)
	return nil
}

// leaf checks the elements of a leaf page, or of a bucket that is small enough
// to be a value, and adds the roots of nested buckets to the list.
func (g *pageGraph) leaf(r reference, count int, page []byte, inline bool) error {
	before, end := r.from, pageHeader+count*pageElement
	if end > len(page) {
		return fmt.Errorf("%d elements do not fit in it", count)
	}
	for i := range count {
		at := pageHeader + i*pageElement
		order := binary.NativeEndian
		flags := order.Uint32(page[at:])
		key, value, err := content(page, at, &end, order.Uint32(page[at+4:]), order.Uint32(page[at+8:]), order.Uint32(page[at+12:]))
		switch {
		case err != nil:
		case flags > 1:
			err = fmt.Errorf("flags %#x", flags)
		case flags == 0 && r.top:
			err = errors.New("a value where only buckets are")
		default:
			err = r.ordered(before, key, i == 0)
		}
		if err == nil && flags == 1 {
			if inline {
				err = errors.New("a bucket in a bucket that is a value") // bbolt writes none
			} else {
				err = g.bucket(r.page, value)
			}
		}
		if err != nil {
			return fmt.Errorf("element %d: %w", i, err)
		}
		before = key
	}
	return nil
}

// bucket checks the value that stands for a nested bucket.
func (g *pageGraph) bucket(by uint64, value []byte) error {
	if len(value) < bucketHeader {
		return fmt.Errorf("a bucket of %d bytes", len(value))
	}
	order := binary.NativeEndian
	if root := order.Uint64(value); root != 0 {
		return g.refer(reference{page: root, by: by})
	}
	page := value[bucketHeader:]
	if len(page) < pageHeader {
		return fmt.Errorf("a bucket of %d bytes", len(value))
	}
	if flags := order.Uint16(page[8:]); flags != leafPage {
		return fmt.Errorf("bucket: flags %#x, not a leaf", flags)
	}
	if err := g.leaf(reference{page: by}, int(order.Uint16(page[10:])), page, true); err != nil {
		return fmt.Errorf("bucket: %w", err)
	}
	return nil
}

// content returns key and value of the element at an offset, and moves end, at
// which they must begin, to where they end.
func content(page []byte, at int, end *int, pos, ksize, vsize uint32) (key, value []byte, err error) {
	start := uint64(at) + uint64(pos)
	middle := start + uint64(ksize)
	next := middle + uint64(vsize)
	switch {
	case start != uint64(*end) || next > uint64(len(page)):
		return nil, nil, fmt.Errorf("bytes %d to %d of %d, want them from %d", start, next, len(page), *end)
	case ksize == 0:
		return nil, nil, errors.New("a key without bytes")
	}
	*end = int(next)
	return page[start:middle], page[middle:next], nil
}

// ordered checks that a key comes after the one before it and is within the
// bounds of its page. Where they are out of order,
// a search misses keys that are there.
func (r reference) ordered(before, key []byte, first bool) error {
	order := bytes.Compare(before, key)
	if order > 0 || order == 0 && !first {
		return fmt.Errorf("key %.64q after %.64q", key, before)
	}
	if r.to != nil && bytes.Compare(key, r.to) >= 0 {
		return fmt.Errorf("key %.64q, but %.64q begins on the next page", key, r.to)
	}
	return nil
}
