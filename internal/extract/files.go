package extract

import (
	"context"
	"crypto/sha256"
	"io"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	filetree "github.com/durable-snapshotter/durable-snapshotter/internal/tree"
)

const (
	// batchFiles is how many files are handed over at a time, at most.
	batchFiles = 16
	// early is the size from which on a file is written to disk as soon as it is
	// complete. Smaller ones wait for the sync, which puts neighbors into one request.
	early = 64 << 10
	// earlyBytes is how much of a big file is handed to the disk at a time.
	earlyBytes = 8 << 20
)

// files writes regular files that have been created. add, wait and end belong to one
// goroutine.
type files struct {
	ctx  context.Context
	fail context.CancelCauseFunc

	written *fsync.Files  // gets those that are complete
	room    chan struct{} // a token for each block in use
	small   chan *batch
	big     chan chunk
	now     *batch         // is being filled
	pending sync.WaitGroup // batches and chunks that are not written yet
	running sync.WaitGroup // goroutines

	mu   sync.Mutex // guards what is in sums
	sums map[uint64]Sum
}

// file is one that was created, and is written by one goroutine at a time.
type file struct {
	attributes
	name string // in the tar, for errors
	fd   int
	size int64
	sum  [sha256.Size]byte // with Options.Digests, when all of it was read

	// Of a big one:
	off int64
	err error
}

// batch is a block with the content of some files.
type batch struct {
	memory *[]byte
	used   int
	files  []*file // their content comes in this order
}

// chunk is a piece of a big file.
type chunk struct {
	file   *file
	memory *[]byte
	n      int
	last   bool
}

func newFiles(ctx context.Context, fail context.CancelCauseFunc, o Options) *files {
	f := &files{
		ctx: ctx, fail: fail, written: o.Files, room: make(chan struct{}, fileBlocks),
		// Every block has its place: who sends does not wait.
		small: make(chan *batch, fileBlocks), big: make(chan chunk, fileBlocks),
	}
	if o.Digests {
		f.sums = map[uint64]Sum{}
	}
	for range min(4, max(2, runtime.GOMAXPROCS(0))) {
		f.running.Go(func() {
			for b := range f.small {
				f.writing(func() { f.writeBatch(b) })
				f.release(b.memory)
				f.pending.Done()
			}
		})
	}
	f.running.Go(func() {
		for c := range f.big {
			f.writing(func() { f.writeChunk(c) })
			f.release(c.memory)
			f.pending.Done()
		}
	})
	return f
}

// writing calls fn while few others write. fn waits for nothing but the kernel.
func (f *files) writing(fn func()) {
	writers <- struct{}{}
	defer func() { <-writers }()
	fn()
}

func (f *files) borrow() (*[]byte, error) {
	select {
	case f.room <- struct{}{}:
		return memory.Get().(*[]byte), nil
	case <-f.ctx.Done():
		return nil, context.Cause(f.ctx)
	}
}

func (f *files) release(b *[]byte) {
	memory.Put(b)
	<-f.room
}

// add reads the content of a file, and has it written. The file belongs to
// files from here on, in case of an error, too.
func (f *files) add(file *file, from *content) error {
	if file.size > blockSize {
		return f.addBig(file, from)
	}
	if f.now != nil && (len(f.now.files) == batchFiles || int64(blockSize-f.now.used) < file.size) {
		f.flush()
	}
	if f.now == nil {
		b, err := f.borrow()
		if err != nil {
			file.abandon()
			return err
		}
		f.now = &batch{memory: b}
	}
	if err := from.fill((*f.now.memory)[f.now.used : f.now.used+int(file.size)]); err != nil {
		file.abandon()
		return failed("read the tar: content of", file.name, err)
	}
	from.end(file)
	f.now.used += int(file.size)
	f.now.files = append(f.now.files, file)
	return nil
}

// flush hands the batch over.
func (f *files) flush() {
	if f.now != nil {
		f.pending.Add(1)
		f.small <- f.now
		f.now = nil
	}
}

func (f *files) addBig(file *file, from *content) error {
	for left := file.size; left > 0; {
		b, err := f.borrow()
		if err != nil {
			f.abandon(file, left < file.size)
			return err
		}
		n := min(left, blockSize)
		if err := from.fill((*b)[:n]); err != nil {
			f.release(b)
			f.abandon(file, left < file.size)
			return failed("read the tar: content of", file.name, err)
		}
		if left -= n; left == 0 {
			from.end(file)
		}
		f.pending.Add(1)
		f.big <- chunk{file: file, memory: b, n: int(n), last: left == 0}
	}
	return nil
}

// abandon closes a file that will not be complete.
func (f *files) abandon(file *file, begun bool) {
	if begun {
		f.pending.Wait() // until nothing writes it
	}
	file.abandon()
}

func (f *file) abandon() {
	if f.fd != closed {
		_ = unix.Close(f.fd) // the layer has failed already
		f.fd = closed
	}
}

func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// wait returns when all that was added is written.
func (f *files) wait() error {
	f.flush()
	f.pending.Wait()
	return context.Cause(f.ctx)
}

// end writes what was added, or closes it if the layer has failed, and ends the
// goroutines.
func (f *files) end() {
	f.flush()
	close(f.small)
	close(f.big)
	f.running.Wait()
}

func (f *files) writeBatch(b *batch) {
	off := 0
	for _, file := range b.files {
		data := (*b.memory)[off : off+int(file.size)]
		off += int(file.size)
		if f.ctx.Err() != nil {
			file.abandon()
			continue
		}
		err := file.write(data)
		if err == nil {
			err = f.finish(file)
		}
		if err != nil {
			file.abandon()
			f.fail(err)
		}
	}
}

func (f *files) writeChunk(c chunk) {
	file := c.file
	if file.err == nil {
		file.err = context.Cause(f.ctx)
	}
	if file.err == nil {
		data := (*c.memory)[:c.n]
		file.err = file.write(data)
		if file.err == nil && file.off%earlyBytes == 0 {
			file.err = file.start(file.off-earlyBytes, earlyBytes)
		}
		if file.err == nil && c.last {
			file.err = f.finish(file)
		}
		if file.err != nil {
			f.fail(file.err)
		}
	}
	if c.last {
		file.abandon()
	}
}

// write appends to the file.
func (f *file) write(data []byte) error {
	for len(data) > 0 {
		n, err := filetree.Retry(func() (int, error) { return unix.Write(f.fd, data) })
		if err != nil {
			return failed("write", f.name, err)
		}
		data = data[n:]
		f.off += int64(n)
	}
	return nil
}

// start has the kernel write a part of the file; 0 bytes are all to the end.
func (f *file) start(off, n int64) error {
	if err := unix.SyncFileRange(f.fd, off, n, unix.SYNC_FILE_RANGE_WRITE); err != nil {
		return failed("start to write", f.name, err)
	}
	return nil
}

// finish gives a written file its attributes, and hands it over or closes it.
func (f *files) finish(file *file) error {
	var st unix.Stat_t
	if err := unix.Fstat(file.fd, &st); err != nil {
		return failed("stat", file.name, err)
	}
	if f.sums != nil {
		// Before it is closed: after it, the number may be that of another file.
		f.mu.Lock()
		f.sums[st.Ino] = Sum{file.size, file.sum}
		f.mu.Unlock()
	}
	a := &file.attributes
	if a.needChown(&st) {
		if err := a.owned(file.name, unix.Fchown(file.fd, a.uid, a.gid)); err != nil {
			return err
		}
	}
	if err := a.setXattrs(f.ctx, file.name, true, func(name string, value []byte) error {
		return unix.Fsetxattr(file.fd, name, value, 0)
	}); err != nil {
		return err
	}
	if a.needChmod(&st) {
		if err := unix.Fchmod(file.fd, a.mode); err != nil {
			return failed("chmod", file.name, err)
		}
	}
	if err := futimens(file.fd, &a.times); err != nil {
		return failed("set the times of", file.name, err)
	}
	if file.size >= early {
		if err := file.start(0, 0); err != nil {
			return err
		}
	}
	fd := file.fd
	file.fd = closed
	if f.written.Add(fd, file.size, file.size >= early) {
		return nil
	}
	if err := unix.Close(fd); err != nil {
		return failed("close", file.name, err)
	}
	return nil
}
