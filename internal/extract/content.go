package extract

import (
	"archive/tar"
	"hash"
	"io"
	"strings"

	"github.com/durable-snapshotter/durable-snapshotter/internal/twosums"
)

// content is that of the regular file that the parser is at.
type content struct {
	stream *stream
	tar    *tar.Reader
	sum    hash.Hash // of the file so far, nil without Options.Digests
	both   twosums.Writer
	sparse bool // the tar has only parts of it, and where they are
}

// begin is called for each file.
func (c *content) begin(h *tar.Header) {
	c.sparse = false
	for name := range h.PAXRecords {
		c.sparse = c.sparse || strings.HasPrefix(name, "GNU.sparse.")
	}
	if c.sum != nil {
		c.sum.Reset()
	}
}

// fill reads the next bytes of the file. Its bytes are those of the stream, unless it is
// sparse: both sums are taken at once.
func (c *content) fill(p []byte) error {
	s := c.stream
	s.held = !c.sparse
	_, err := io.ReadFull(c.tar, p)
	s.held = false
	switch {
	case err != nil:
		return unexpected(err) // there will be no sums
	case c.sum == nil && !c.sparse:
		s.sum.Write(p)
	case c.sum != nil && c.sparse:
		c.sum.Write(p)
	case c.sum != nil:
		c.both.Write(s.sum, c.sum, p)
	}
	return nil
}

// end gives a file that was read the sum of its content.
func (c *content) end(f *file) {
	if c.sum != nil {
		c.sum.Sum(f.sum[:0])
	}
}
