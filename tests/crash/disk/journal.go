package disk

import (
	"encoding/binary"
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Journal returns where the file system keeps what it needs to come back from a
// crash, for Fault.Ranges: the journal of ext4, the log of xfs, and for btrfs,
// which has neither, the superblocks and the chunks of metadata. The disk must
// hold the file system and should not be mounted.
func (v *Volume) Journal(f FS) ([]Range, error) {
	var ranges []Range
	var err error
	switch f {
	case Ext4:
		ranges, err = ext4Journal(v.Device())
	case XFS:
		ranges, err = xfsLog(v.image)
	case Btrfs:
		ranges, err = btrfsMetadata(v.Device(), int64(len(v.image)))
	default:
		err = fmt.Errorf("unknown file system %q", f)
	}
	if err != nil {
		return nil, fmt.Errorf("journal of %s: %w", v.Device(), err)
	}
	if len(ranges) == 0 {
		return nil, fmt.Errorf("journal of %s: none found", v.Device())
	}
	return ranges, nil
}

// Outside returns the parts of the disk that lie in none of the ranges.
func (v *Volume) Outside(ranges []Range) []Range {
	ranges = slices.Clone(ranges)
	slices.SortFunc(ranges, func(a, b Range) int { return int(a.Offset - b.Offset) })
	var out []Range
	at := int64(0)
	for _, r := range append(ranges, Range{Offset: int64(len(v.image))}) {
		if r.Offset > at {
			out = append(out, Range{at, r.Offset - at})
		}
		at = max(at, r.Offset+r.Length)
	}
	return out
}

// ext4Journal gets from debugfs the extents of inode 8, the journal. Its table
// has one line for each extent: level, entries, logical, physical, length.
func ext4Journal(device string) ([]Range, error) {
	const blockSize = 4096 // set by Format
	out, err := exec.Command("debugfs", "-R", "ex <8>", device).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("debugfs: %w: %s", err, out)
	}
	leaf := regexp.MustCompile(`(?m)^\s*(\d+)/\s*(\d+)\s+\d+/\s*\d+\s+\d+\s*-\s*\d+\s+(\d+)\s*-\s*(\d+)`)
	var ranges []Range
	for _, m := range leaf.FindAllStringSubmatch(string(out), -1) {
		if m[1] != m[2] {
			continue // an inner node of the tree
		}
		first, err1 := strconv.ParseInt(m[3], 10, 64)
		last, err2 := strconv.ParseInt(m[4], 10, 64)
		if err1 != nil || err2 != nil || last < first {
			return nil, fmt.Errorf("debugfs: extent %q", m[0])
		}
		ranges = append(ranges, Range{first * blockSize, (last - first + 1) * blockSize})
	}
	return ranges, nil
}

// xfsLog reads the superblock (fs/xfs/libxfs/xfs_format.h, struct xfs_dsb).
func xfsLog(image []byte) ([]Range, error) {
	if string(image[:4]) != "XFSB" {
		return nil, fmt.Errorf("no xfs superblock")
	}
	blockSize := int64(binary.BigEndian.Uint32(image[4:]))
	logStart := binary.BigEndian.Uint64(image[48:])
	agBlocks := int64(binary.BigEndian.Uint32(image[84:]))
	logBlocks := int64(binary.BigEndian.Uint32(image[96:]))
	agLog := image[124]
	// A block number is the number of the allocation group, then agLog bits of
	// the block in it.
	block := int64(logStart>>agLog)*agBlocks + int64(logStart&(1<<agLog-1))
	r := Range{block * blockSize, logBlocks * blockSize}
	if r.Offset <= 0 || r.Length <= 0 || r.Offset+r.Length > int64(len(image)) {
		return nil, fmt.Errorf("xfs superblock has %+v", r)
	}
	return []Range{r}, nil
}

// btrfsMetadata dumps the chunk tree, and takes the stripes of the chunks of
// type METADATA and SYSTEM.
func btrfsMetadata(device string, size int64) ([]Range, error) {
	out, err := exec.Command("btrfs", "inspect-internal", "dump-tree", "-t", "chunk", device).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("btrfs inspect-internal: %w: %s", err, out)
	}
	var ranges []Range
	for _, super := range []int64{64 << 10, 64 << 20, 256 << 30} {
		if super+4096 <= size {
			ranges = append(ranges, Range{super, 4096})
		}
	}
	chunk := regexp.MustCompile(`length (\d+) owner \d+ stripe_len \d+ type (\S+)`)
	stripe := regexp.MustCompile(`stripe \d+ devid \d+ offset (\d+)`)
	var length int64
	var kind string
	var found bool
	for _, line := range strings.Split(string(out), "\n") {
		if m := chunk.FindStringSubmatch(line); m != nil {
			kind = m[2]
			length, _ = strconv.ParseInt(m[1], 10, 64)
			continue
		}
		m := stripe.FindStringSubmatch(line)
		if m == nil || !strings.Contains(kind, "METADATA") && !strings.Contains(kind, "SYSTEM") {
			continue
		}
		offset, _ := strconv.ParseInt(m[1], 10, 64)
		if offset <= 0 || length <= 0 || offset+length > size {
			return nil, fmt.Errorf("btrfs chunk at %d+%d", offset, length)
		}
		ranges = append(ranges, Range{offset, length})
		found = true
	}
	if !found {
		return nil, fmt.Errorf("btrfs chunk tree: no metadata chunk in %d bytes of output", len(out))
	}
	return ranges, nil
}
