package extract

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"

	"github.com/durable-snapshotter/durable-snapshotter/internal/idle"
)

// memory lends blocks of blockSize bytes to all layers.
var memory = sync.Pool{New: func() any { b := make([]byte, blockSize); return &b }}

// block is a piece of the stream.
type block struct {
	data   []byte
	memory *[]byte
	users  atomic.Int32 // who have not read it yet
}

// stream reads blocks ahead, each for the hash and for the parser. It is an io.Reader
// for the parser.
type stream struct {
	src     io.Reader
	room    chan struct{} // a token for each block in use
	toHash  chan *block
	toParse chan *block
	err     error // why there are no more blocks, valid when toParse is closed
	size    int64 // of all blocks, valid with err

	now  *block // that the parser reads
	left []byte // of now
}

func newStream(src io.Reader) *stream {
	return &stream{
		src: src, room: make(chan struct{}, streamBlocks),
		toHash: make(chan *block, streamBlocks), toParse: make(chan *block, streamBlocks),
	}
}

// read reads the source to its end, or until the context is done.
func (s *stream) read(ctx context.Context) {
	defer close(s.toParse)
	defer close(s.toHash)
	for s.err == nil {
		select {
		case s.room <- struct{}{}:
		case <-ctx.Done():
			s.err = context.Cause(ctx)
			return
		}
		b := &block{memory: memory.Get().(*[]byte)}
		b.users.Store(2)
		n := 0
		for n < blockSize && s.err == nil {
			s.err = idle.Contain(func() error {
				got, err := s.src.Read((*b.memory)[n:])
				n += got
				return err
			})
			if s.err == nil {
				s.err = ctx.Err()
			}
		}
		b.data = (*b.memory)[:n]
		s.size += int64(n)
		// The channels have room for all blocks that there can be.
		s.toHash <- b
		s.toParse <- b
	}
}

func (s *stream) release(b *block) {
	if b.users.Add(-1) == 0 {
		memory.Put(b.memory)
		<-s.room
	}
}

// Read is for the parser.
func (s *stream) Read(p []byte) (int, error) {
	for len(s.left) == 0 {
		if s.now != nil {
			s.release(s.now)
			s.now = nil
		}
		b, more := <-s.toParse
		if !more {
			if errors.Is(s.err, io.EOF) {
				return 0, io.EOF
			}
			return 0, s.err
		}
		s.now, s.left = b, b.data
	}
	n := copy(p, s.left)
	s.left = s.left[n:]
	return n, nil
}

// abandon gives back what the parser will not read. The stream has ended, or is about to
// because its context is done.
func (s *stream) abandon() {
	if s.now != nil {
		s.release(s.now)
		s.now, s.left = nil, nil
	}
	for b := range s.toParse {
		s.release(b)
	}
}
