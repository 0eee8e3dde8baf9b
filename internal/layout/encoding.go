package layout

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
)

// ErrNewer is wrapped by errors that mean: this was written by a newer version
// of the program. It is intact; use that version.
var ErrNewer = errors.New("written by a newer version of durable-snapshotter")

// ErrCorrupt is wrapped by errors that mean: these bytes are not what was
// written.
var ErrCorrupt = errors.New("corrupt record")

// recordVersion is the version of the payloads that Encode writes.
const recordVersion = 1

// recordHeader is the size of what stands before the payload:
//
//	0      4        5      8            12          16
//	+------+--------+------+------------+-----------+---------
//	| DSNR | version| 0 0 0| length (LE)| CRC32C(LE)| payload …
//	+------+--------+------+------------+-----------+---------
//
// The checksum covers the first 12 bytes and the payload.
const recordHeader = 16

// maxPayload bounds the length that Decode accepts. Labels are the only part
// of a record without a limit of their own; gRPC limits a message to 16 MiB.
const maxPayload = 32 << 20

var (
	recordMagic = [4]byte{'D', 'S', 'N', 'R'}
	castagnoli  = crc32.MakeTable(crc32.Castagnoli)
)

// Encode returns a record: a header with version and checksum, then v as JSON. An
// error means that v has no JSON, or more than 32 MiB of it.
func Encode(v any) ([]byte, error) { return encode(v, 0) }

// encode is Encode, and fills what is shorter than size up to it, with spaces at the end of the JSON.
func encode(v any, size int) ([]byte, error) {
	payload, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode record: %w", err)
	}
	if len(payload) > maxPayload {
		return nil, fmt.Errorf("encode record: %d bytes are more than %d", len(payload), maxPayload)
	}
	if fill := size - recordHeader - len(payload); fill > 0 {
		payload = append(payload, bytes.Repeat([]byte{' '}, fill)...)
	}
	b := make([]byte, recordHeader, recordHeader+len(payload))
	copy(b, recordMagic[:])
	b[4] = recordVersion
	binary.LittleEndian.PutUint32(b[8:], uint32(len(payload)))
	b = append(b, payload...)
	binary.LittleEndian.PutUint32(b[12:], checksum(b))
	return b, nil
}

// Decode decodes what Encode wrote into v. The error wraps ErrCorrupt when the
// bytes are damaged and ErrNewer when their version is unknown.
func Decode(b []byte, v any) error {
	payload, err := Payload(b)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(payload, v); err != nil {
		return fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return nil
}

// Payload returns the JSON in what Encode wrote. The errors are those of Decode.
func Payload(b []byte) ([]byte, error) {
	if len(b) < recordHeader {
		return nil, fmt.Errorf("%w: %d bytes are less than a header", ErrCorrupt, len(b))
	}
	if [4]byte(b[:4]) != recordMagic {
		return nil, fmt.Errorf("%w: it begins with %q", ErrCorrupt, b[:4])
	}
	length := binary.LittleEndian.Uint32(b[8:])
	if length > maxPayload || int(length) != len(b)-recordHeader {
		return nil, fmt.Errorf("%w: the payload has %d bytes, the header has %d", ErrCorrupt, len(b)-recordHeader, length)
	}
	if sum := binary.LittleEndian.Uint32(b[12:]); sum != checksum(b) {
		return nil, fmt.Errorf("%w: checksum %08x, the header has %08x", ErrCorrupt, checksum(b), sum)
	}
	// After the checksum: a flipped bit in the version byte is damage, not a
	// newer version.
	switch version := b[4]; {
	case version > recordVersion:
		return nil, fmt.Errorf("record version %d: %w", version, ErrNewer)
	case version == 0 || b[5]|b[6]|b[7] != 0:
		return nil, fmt.Errorf("%w: version %d, reserved bytes %x", ErrCorrupt, version, b[5:8])
	}
	return b[recordHeader:], nil
}

func checksum(b []byte) uint32 {
	return crc32.Update(crc32.Checksum(b[:12], castagnoli), castagnoli, b[recordHeader:])
}
