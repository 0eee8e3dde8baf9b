package disk

import (
	"bytes"
	"fmt"
	"sync"
	"syscall"
	"time"
)

// recorder is the disk itself, in the server process: the image, the log, the
// faults. One lock makes their order the order of the log.
type recorder struct {
	mu      sync.Mutex
	image   []byte
	log     []Entry
	limit   int64 // bytes of data that the log may hold
	held    int64 // bytes of data that it holds
	lite    bool  // remember only where writes went, not what they were
	touched []Range
	stats   Stats
	faults  []*armed
	nextID  int
}

// strike returns what the faults make of a request.
func (r *recorder) strike(op Op, where Range) (stall time.Duration, short int64, errno syscall.Errno) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, f := range r.faults {
		if !f.strikes(op, where) {
			continue
		}
		stall = max(stall, f.Stall)
		if f.Errno != 0 {
			short, errno = f.Short, f.Errno
		}
		text := fmt.Sprintf("fault %d: %s %d+%d: %s", f.ID, op, where.Offset, where.Length, f.Fault)
		r.append(Entry{Kind: Mark, Text: text[:min(len(text), maxMark)]})
	}
	return stall, short, errno
}

// Size is that of the disk, in bytes.
func (r *recorder) Size() int64 { return int64(len(r.image)) }

// Write returns how many bytes were written.
func (r *recorder) Write(offset int64, data []byte) (int, syscall.Errno) {
	where := Range{offset, int64(len(data))}
	if offset < 0 || offset+where.Length > int64(len(r.image)) {
		return 0, syscall.ENOSPC
	}
	stall, short, errno := r.strike(OpWrite, where)
	time.Sleep(stall)
	if errno != 0 {
		if data = data[:min(short, where.Length)]; len(data) == 0 {
			return 0, errno
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	copy(r.image[offset:], data)
	r.stats.Writes++
	r.stats.Bytes += int64(len(data))
	e := Entry{Kind: Write, Offset: offset, Length: int64(len(data))}
	if !r.lite {
		e.Data = bytes.Clone(data) // FUSE uses its buffer again
	}
	r.append(e)
	return len(data), errno
}

// Flush is a flush of the cache.
func (r *recorder) Flush() syscall.Errno {
	stall, _, errno := r.strike(OpFlush, Range{})
	time.Sleep(stall)
	if errno != 0 {
		return errno
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stats.Flushes++
	r.append(Entry{Kind: Flush})
	return 0
}

// Zero is a discard, or a write of zeroes.
func (r *recorder) Zero(offset, length int64) syscall.Errno {
	if offset < 0 || length < 0 || offset+length > int64(len(r.image)) {
		return syscall.EINVAL
	}
	stall, _, errno := r.strike(OpDiscard, Range{offset, length})
	time.Sleep(stall)
	if errno != 0 {
		return errno
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.image[offset : offset+length])
	r.stats.Discards++
	r.append(Entry{Kind: Discard, Offset: offset, Length: length})
	return 0
}

// Read copies out of the image. It takes no lock: the kernel does not read and
// write one place at the same time unless the file system above does, and then
// it owns the race.
func (r *recorder) Read(offset int64, buf []byte) (int, syscall.Errno) {
	if offset < 0 || offset >= int64(len(r.image)) {
		return 0, 0
	}
	n := min(int64(len(buf)), int64(len(r.image))-offset)
	stall, _, errno := r.strike(OpRead, Range{offset, n})
	time.Sleep(stall)
	if errno != 0 {
		return 0, errno
	}
	r.mu.Lock()
	r.stats.Reads++
	r.mu.Unlock()
	return copy(buf, r.image[offset:offset+n]), 0
}

// append must be called with mu held.
func (r *recorder) append(e Entry) {
	if r.lite {
		if e.Touches() {
			r.touched = append(r.touched, Range{e.Offset, e.Length})
		}
		return
	}
	r.held += int64(len(e.Data)) + int64(len(e.Text)) + 64
	if r.held > r.limit {
		r.stats.Overflow = true
		return
	}
	if e.Kind == Mark {
		r.stats.Marks++
	}
	r.log = append(r.log, e)
	r.stats.Entries = len(r.log)
}

// mark appends a mark and returns its index in the log.
func (r *recorder) mark(text string) (int, error) {
	if len(text) > maxMark {
		return 0, fmt.Errorf("mark %q…: longer than the %d bytes that the log's format holds", text[:40], maxMark)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.lite {
		return 0, fmt.Errorf("mark %q: the disk is not recording", text)
	}
	r.append(Entry{Kind: Mark, Text: text})
	if r.stats.Overflow {
		return 0, fmt.Errorf("mark %q: the log has reached its limit of %d bytes", text, r.limit)
	}
	return len(r.log) - 1, nil
}

// reset forgets the log and the counts. Faults stay.
func (r *recorder) reset(lite bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.log, r.touched, r.held, r.stats, r.lite = nil, nil, 0, Stats{}, lite
}

// takeTouched returns the places written since the last call.
func (r *recorder) takeTouched() []Range {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := r.touched
	r.touched = nil
	return t
}

func (r *recorder) inject(f Fault) (int, error) {
	if err := f.valid(); err != nil {
		return 0, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.nextID++
	r.faults = append(r.faults, &armed{Fault: f, FaultStats: FaultStats{ID: r.nextID}})
	return r.nextID, nil
}

func (r *recorder) heal() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults = nil
}

func (r *recorder) snapshot() Stats {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.stats
	for _, f := range r.faults {
		s.Faults = append(s.Faults, f.FaultStats)
	}
	return s
}

// entries returns the log so far. Entries are never changed once they are in
// it, so the caller needs no lock to read them.
func (r *recorder) entries() []Entry {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.log[:len(r.log):len(r.log)]
}
