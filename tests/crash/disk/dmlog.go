package disk

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// The format of dm-log-writes (Documentation/admin-guide/device-mapper/log-writes.rst
// of Linux), so that replay-log of xfstests and QEMU's blklogwrites understand
// our logs and we theirs. All numbers are little-endian, every part fills whole
// sectors:
//
//	sector 0   magic u64 · version u64 · number of entries u64 · sector size u32
//	then, for each entry
//	1 sector   sector u64 · number of sectors u64 · flags u64 · data length u64
//	           · for a mark: its text, data length bytes
//	n sectors  for a write: the data
//
// A discard has no data. What the kernel calls FUA we have never seen: the loop
// driver announces none. On import such an entry becomes a Write and a Flush,
// as the block layer would have done it.
const (
	dmMagic   = 0x6a736677736872
	dmVersion = 1

	dmFlush   = 1 << 0
	dmFUA     = 1 << 1
	dmDiscard = 1 << 2
	dmMark    = 1 << 3

	dmHeader = 4 * 8
	maxMark  = SectorSize - dmHeader - 1

	// SectorSize is the unit of dm-log-writes and of our loop devices.
	SectorSize = 512
)

// ErrFormat is returned for a log that is not one of dm-log-writes.
var ErrFormat = errors.New("not a dm-log-writes log")

// Export writes a log.
func Export(w io.Writer, log []Entry) error {
	b := bufio.NewWriterSize(w, 1<<20)
	var sector [SectorSize]byte
	binary.LittleEndian.PutUint64(sector[0:], dmMagic)
	binary.LittleEndian.PutUint64(sector[8:], dmVersion)
	binary.LittleEndian.PutUint64(sector[16:], uint64(len(log)))
	binary.LittleEndian.PutUint32(sector[24:], SectorSize)
	if _, err := b.Write(sector[:]); err != nil {
		return fmt.Errorf("export log: %w", err)
	}
	for i := range log {
		if err := exportEntry(b, &log[i]); err != nil {
			return fmt.Errorf("export log: entry %d: %w", i, err)
		}
	}
	if err := b.Flush(); err != nil {
		return fmt.Errorf("export log: %w", err)
	}
	return nil
}

func exportEntry(w io.Writer, e *Entry) error {
	var sector [SectorSize]byte
	var flags uint64
	switch e.Kind {
	case Write:
	case Flush:
		flags = dmFlush
	case Discard:
		flags = dmDiscard
	case Mark:
		flags = dmMark
		if len(e.Text) > maxMark {
			return fmt.Errorf("mark of %d bytes is too long", len(e.Text))
		}
		binary.LittleEndian.PutUint64(sector[24:], uint64(len(e.Text)))
		copy(sector[dmHeader:], e.Text)
	default:
		return fmt.Errorf("%s: %w", e.Kind, ErrFormat)
	}
	if e.Offset%SectorSize != 0 || e.Length%SectorSize != 0 {
		return fmt.Errorf("%s is not aligned to sectors", e)
	}
	binary.LittleEndian.PutUint64(sector[0:], uint64(e.Offset/SectorSize))
	binary.LittleEndian.PutUint64(sector[8:], uint64(e.Length/SectorSize))
	binary.LittleEndian.PutUint64(sector[16:], flags)
	if _, err := w.Write(sector[:]); err != nil {
		return err
	}
	_, err := w.Write(e.Data)
	return err
}

// Import reads a log.
func Import(r io.Reader) ([]Entry, error) {
	b := bufio.NewReaderSize(r, 1<<20)
	head := make([]byte, SectorSize)
	if _, err := io.ReadFull(b, head); err != nil {
		return nil, fmt.Errorf("import log: %w", err)
	}
	n := binary.LittleEndian.Uint64(head[16:])
	size := int64(binary.LittleEndian.Uint32(head[24:]))
	if binary.LittleEndian.Uint64(head) != dmMagic || binary.LittleEndian.Uint64(head[8:]) != dmVersion ||
		size < SectorSize || size > 1<<16 || size&(size-1) != 0 {
		return nil, fmt.Errorf("import log: %w", ErrFormat)
	}
	if _, err := b.Discard(int(size - SectorSize)); err != nil {
		return nil, fmt.Errorf("import log: %w", err)
	}
	var log []Entry
	for i := range n {
		var err error
		if log, err = importEntry(b, size, log); err != nil {
			return nil, fmt.Errorf("import log: entry %d of %d: %w", i, n, err)
		}
	}
	return log, nil
}

// importEntry reads one entry of the file, which may be two of ours.
func importEntry(r *bufio.Reader, size int64, log []Entry) ([]Entry, error) {
	sector := make([]byte, size)
	if _, err := io.ReadFull(r, sector); err != nil {
		return nil, err
	}
	at := binary.LittleEndian.Uint64(sector[0:])
	count := binary.LittleEndian.Uint64(sector[8:])
	flags := binary.LittleEndian.Uint64(sector[16:])
	text := binary.LittleEndian.Uint64(sector[24:])
	// 1 TiB: a limit that no test disk reaches, against numbers that would
	// make us allocate what a broken file claims.
	if at > 1<<40/uint64(size) || count > 1<<40/uint64(size) || text > uint64(size)-dmHeader {
		return nil, ErrFormat
	}
	where := Range{int64(at) * size, int64(count) * size}
	// A flush that carries data flushes what came before it, and not the data.
	if flags&dmFlush != 0 {
		log = append(log, Entry{Kind: Flush})
	}
	switch {
	case flags&dmMark != 0:
		return append(log, Entry{Kind: Mark, Text: string(sector[dmHeader : dmHeader+text])}), nil
	case flags&dmDiscard != 0:
		return append(log, Entry{Kind: Discard, Offset: where.Offset, Length: where.Length}), nil
	case count == 0:
		return log, nil
	}
	data, err := readExactly(r, where.Length)
	if err != nil {
		return nil, err
	}
	log = append(log, Entry{Kind: Write, Offset: where.Offset, Length: where.Length, Data: data})
	if flags&dmFUA != 0 {
		log = append(log, Entry{Kind: Flush})
	}
	return log, nil
}

// readExactly grows its buffer as data arrives, so that a lying length costs no
// more memory than the file has bytes.
func readExactly(r io.Reader, n int64) ([]byte, error) {
	const step = 1 << 20
	data := make([]byte, 0, min(n, step))
	for int64(len(data)) < n {
		part := make([]byte, min(n-int64(len(data)), step))
		if _, err := io.ReadFull(r, part); err != nil {
			return nil, err
		}
		data = append(data, part...)
	}
	return data, nil
}
