package state

import (
	"bytes"
	"fmt"
	"io"
	"maps"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
)

// Image is the content of a disk at one moment: the blocks that are not zero.
// The bytes of a block are never changed once they are in an image, so clones
// share them, with each other and with the entries of a log.
type Image struct {
	Size   int64 // of the disk, a multiple of Block
	blocks map[int64][]byte
}

// ReadImage copies what is on a disk.
func ReadImage(m Medium) (*Image, error) {
	memory := m.Image()
	ranges, err := m.InMemory()
	if err != nil {
		return nil, err
	}
	i := &Image{Size: int64(len(memory)), blocks: map[int64][]byte{}}
	for _, r := range ranges {
		i.put(r.Offset, bytes.Clone(memory[r.Offset:r.Offset+r.Length]))
	}
	return i, nil
}

// put makes the blocks of data, which begins at a block, blocks of the image.
// data is not copied.
func (i *Image) put(offset int64, data []byte) {
	for len(data) > 0 {
		block := data[:Block:Block]
		if bytes.Equal(block, zeroes[:]) {
			delete(i.blocks, offset/Block)
		} else {
			i.blocks[offset/Block] = block
		}
		data, offset = data[Block:], offset+Block
	}
}

// Clone returns an image to which entries can be applied without changing i.
func (i *Image) Clone() *Image { return &Image{Size: i.Size, blocks: maps.Clone(i.blocks)} }

// at returns the block that begins at the offset; not to be written to.
func (i *Image) at(offset int64) []byte {
	if b, ok := i.blocks[offset/Block]; ok {
		return b
	}
	return zeroes[:]
}

// Apply makes the entry's change to the image, which keeps the data of the entry.
func (i *Image) Apply(e *disk.Entry) {
	if !e.Touches() {
		return
	}
	for _, p := range pieces(e) {
		data := pieceOf(e, p)
		if p.Length < Block {
			block := bytes.Clone(i.at(p.Offset - p.Offset%Block))
			copy(block[p.Offset%Block:], data)
			data = block
		}
		i.put(p.Offset-p.Offset%Block, data)
	}
}

// WriteTo writes every byte of the disk, in order.
func (i *Image) WriteTo(w io.Writer) (int64, error) {
	for at := int64(0); at < i.Size; at += Block {
		if _, err := w.Write(i.at(at)); err != nil {
			return at, err
		}
	}
	return i.Size, nil
}

// NewImage reads every byte of a disk of the given size, in order.
func NewImage(r io.Reader, size int64) (*Image, error) {
	if size <= 0 || size%Block != 0 {
		return nil, fmt.Errorf("image: size %d is not a multiple of %d", size, Block)
	}
	i := &Image{Size: size, blocks: map[int64][]byte{}}
	var block [Block]byte
	for at := int64(0); at < size; at += Block {
		if _, err := io.ReadFull(r, block[:]); err != nil {
			return nil, fmt.Errorf("image: %w", err)
		}
		if block != zeroes {
			i.put(at, bytes.Clone(block[:]))
		}
	}
	return i, nil
}
