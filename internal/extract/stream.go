package extract

import (
	"context"
	"crypto/sha256"
	"errors"
	"hash"
	"io"
	"sync"

	"github.com/durable-snapshotter/durable-snapshotter/internal/idle"
)

// memory lends blocks of blockSize bytes to all layers.
var memory = sync.Pool{New: func() any { b := make([]byte, blockSize); return &b }}

// block is a piece of the stream.
type block struct {
	data   []byte
	memory *[]byte
}

// stream reads blocks ahead. It is an io.Reader for the parser, and hashes what that reads.
type stream struct {
	src    io.Reader
	room   chan struct{} // a token for each block in use
	blocks chan block
	err    error // why there are no more blocks, valid when blocks is closed
	size   int64 // of all blocks, valid with err

	now  block  // that the parser reads
	left []byte // of now
	sum  hash.Hash
	held bool // the reader hashes
}

func newStream(src io.Reader) *stream {
	return &stream{
		src: src, room: make(chan struct{}, streamBlocks), blocks: make(chan block, streamBlocks), sum: sha256.New(),
	}
}

// read reads the source to its end, or until the context is done.
func (s *stream) read(ctx context.Context) {
	defer close(s.blocks)
	for s.err == nil {
		select {
		case s.room <- struct{}{}:
		case <-ctx.Done():
			s.err = context.Cause(ctx)
			return
		}
		b := block{memory: memory.Get().(*[]byte)}
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
		s.blocks <- b // there is room for all that there can be
	}
}

func (s *stream) release(b block) {
	memory.Put(b.memory)
	<-s.room
}

// Read is for the parser.
func (s *stream) Read(p []byte) (int, error) {
	for len(s.left) == 0 {
		if s.now.memory != nil {
			s.release(s.now)
			s.now = block{}
		}
		b, more := <-s.blocks
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
	if !s.held {
		s.sum.Write(p[:n])
	}
	return n, nil
}

// abandon gives back what the parser will not read. The stream has ended, or is about to
// because its context is done.
func (s *stream) abandon() {
	if s.now.memory != nil {
		s.release(s.now)
		s.now, s.left = block{}, nil
	}
	for b := range s.blocks {
		s.release(b)
	}
}
