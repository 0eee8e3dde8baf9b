package contents

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"hash"
)

// A file with large holes has a digest of its own kind: to compute SHA-256 over
// 8 TiB of zeros takes hours, even if none of them is read. It is the SHA-256 of
// every block of 4,096 bytes that is not all zeros, in order, each after its
// offset, and of the size of the file; offset and size are 64 bit little-endian
// numbers, and a last block that is not full is as long as it is. It depends on
// the content alone: zeros that are written and holes are the same.
//
// A list of contents has it as tags=sparse-sha256:<hex>. mtree(8) ignores tags.
const (
	sparseBlock = 4096
	// sparseHoles is the number of bytes in holes from which on a file has this digest.
	sparseHoles = 1 << 20
)

// contentHash is a digest of either kind.
type contentHash struct {
	hash   hash.Hash
	sparse bool
	off    int64
	block  []byte // sparse: the beginning of a block
}

func newContentHash(sparse bool) *contentHash {
	h := &contentHash{hash: sha256.New(), sparse: sparse}
	if sparse {
		h.block = make([]byte, 0, sparseBlock)
	}
	return h
}

var zeroBytes = make([]byte, 64<<10)

func isZero(b []byte) bool {
	for len(b) > len(zeroBytes) {
		if !bytes.Equal(b[:len(zeroBytes)], zeroBytes) {
			return false
		}
		b = b[len(zeroBytes):]
	}
	return bytes.Equal(b, zeroBytes[:len(b)])
}

// write adds content.
func (h *contentHash) write(b []byte) {
	if !h.sparse {
		h.hash.Write(b)
		return
	}
	for len(b) > 0 {
		if len(h.block) == 0 && len(b) >= sparseBlock {
			h.add(b[:sparseBlock])
			b = b[sparseBlock:]
			continue
		}
		n := min(len(b), sparseBlock-len(h.block))
		h.block = append(h.block, b[:n]...)
		b = b[n:]
		if len(h.block) == sparseBlock {
			h.add(h.block)
			h.block = h.block[:0]
		}
	}
}

func (h *contentHash) add(block []byte) {
	if !isZero(block) {
		var off [8]byte
		binary.LittleEndian.PutUint64(off[:], uint64(h.off))
		h.hash.Write(off[:])
		h.hash.Write(block)
	}
	h.off += int64(len(block))
}

// zeros adds n zeros.
func (h *contentHash) zeros(ctx context.Context, n int64) error {
	for n > 0 {
		if h.sparse && len(h.block) == 0 && n >= sparseBlock {
			whole := n &^ (sparseBlock - 1)
			h.off += whole
			n -= whole
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		m := min(n, int64(len(zeroBytes)))
		if h.sparse {
			m = min(m, int64(sparseBlock-len(h.block)))
		}
		h.write(zeroBytes[:m])
		n -= m
	}
	return nil
}

func (h *contentHash) sum() (sum [sha256.Size]byte) {
	if h.sparse {
		size := h.off + int64(len(h.block))
		if len(h.block) > 0 {
			h.add(h.block)
			h.block = h.block[:0]
		}
		h.hash.Write(binary.LittleEndian.AppendUint64(nil, uint64(size)))
	}
	h.hash.Sum(sum[:0])
	return sum
}

func (h *contentHash) hex() string {
	sum := h.sum()
	return hex.EncodeToString(sum[:])
}
