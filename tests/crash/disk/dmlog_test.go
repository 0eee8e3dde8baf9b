package disk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
)

// file builds a dm-log-writes file by hand, from the kernel's documentation.
func file(entries ...[]byte) []byte {
	b := make([]byte, SectorSize)
	binary.LittleEndian.PutUint64(b[0:], 0x6a736677736872)
	binary.LittleEndian.PutUint64(b[8:], 1)
	binary.LittleEndian.PutUint64(b[16:], uint64(len(entries)))
	binary.LittleEndian.PutUint32(b[24:], SectorSize)
	return append(b, bytes.Join(entries, nil)...)
}

func entry(sector, count, flags uint64, text string, data []byte) []byte {
	b := make([]byte, SectorSize)
	binary.LittleEndian.PutUint64(b[0:], sector)
	binary.LittleEndian.PutUint64(b[8:], count)
	binary.LittleEndian.PutUint64(b[16:], flags)
	binary.LittleEndian.PutUint64(b[24:], uint64(len(text)))
	copy(b[32:], text)
	return append(b, data...)
}

func TestImport(t *testing.T) {
	data := bytes.Repeat([]byte{7}, 2*SectorSize)
	write := Entry{Kind: Write, Offset: 5 * SectorSize, Length: 2 * SectorSize, Data: data}
	for _, row := range []struct {
		name string
		file []byte
		want []Entry
	}{
		{"empty", file(), nil},
		{"write", file(entry(5, 2, 0, "", data)), []Entry{write}},
		{"metadata write", file(entry(5, 2, 16, "", data)), []Entry{write}},
		{"flush", file(entry(0, 0, 1, "", nil)), []Entry{{Kind: Flush}}},
		{"flush with data flushes what came before", file(entry(5, 2, 1, "", data)), []Entry{{Kind: Flush}, write}},
		{"fua flushes the data", file(entry(5, 2, 2, "", data)), []Entry{write, {Kind: Flush}}},
		{"flush and fua", file(entry(5, 2, 3, "", data)), []Entry{{Kind: Flush}, write, {Kind: Flush}}},
		{"discard has no data", file(entry(5, 2, 4, "", nil)), []Entry{{Kind: Discard, Offset: 5 * SectorSize, Length: 2 * SectorSize}}},
		{"mark", file(entry(0, 0, 8, "acked", nil)), []Entry{{Kind: Mark, Text: "acked"}}},
	} {
		t.Run(row.name, func(t *testing.T) {
			got, err := Import(bytes.NewReader(row.file))
			if err != nil {
				t.Fatal(err)
			}
			if diff := difference(row.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestImportRefuses(t *testing.T) {
	good := file(entry(5, 1, 0, "", make([]byte, SectorSize)))
	for _, row := range []struct {
		name  string
		spoil func([]byte) []byte
	}{
		{"nothing", func(b []byte) []byte { return nil }},
		{"cut in the data", func(b []byte) []byte { return b[:len(b)-1] }},
		{"other magic", func(b []byte) []byte { b[0]++; return b }},
		{"other version", func(b []byte) []byte { b[8]++; return b }},
		{"sector size 0", func(b []byte) []byte { b[25] = 0; return b }},
		{"absurd length", func(b []byte) []byte { b[SectorSize+15] = 0xff; return b }},
		{"more entries than there are", func(b []byte) []byte { b[16]++; return b }},
	} {
		t.Run(row.name, func(t *testing.T) {
			if log, err := Import(bytes.NewReader(row.spoil(bytes.Clone(good)))); err == nil {
				t.Errorf("accepted: %v", log)
			}
		})
	}
	_, err := Import(bytes.NewReader(make([]byte, SectorSize)))
	if !errors.Is(err, ErrFormat) {
		t.Errorf("a sector of zeroes: %v, want ErrFormat", err)
	}
}

func FuzzImport(f *testing.F) {
	f.Add(file(entry(5, 1, 3, "", make([]byte, SectorSize)), entry(0, 0, 8, "mark", nil), entry(9, 9, 4, "", nil)))
	f.Fuzz(func(t *testing.T, b []byte) {
		log, err := Import(bytes.NewReader(b))
		if err != nil {
			return
		}
		var out bytes.Buffer
		if err := Export(&out, log); err != nil {
			t.Skip("a mark or sector size that we do not write")
		}
		again, err := Import(&out)
		if err != nil {
			t.Fatal(err)
		}
		if diff := difference(log, again); diff != "" {
			t.Error(diff)
		}
	})
}
