package layout

import (
	"bytes"
	"errors"
	"testing"
	"time"
)

// committed is a record with every field set.
func committed() Record {
	at := time.Date(2026, 11, 21, 12, 30, 0, 5, time.UTC)
	return Record{
		ID: 12, Kind: "committed", Name: "k8s.io/3/" + chain, Parent: "k8s.io/2/" + chain,
		Labels: map[string]string{LabelTarget: chain}, Created: at, Updated: at,
		Inodes: 3, Size: 1 << 20, Entries: 4, Bytes: 1 << 40, Digest: chain, Contents: chain,
		Overlay: &OverlayMarks{Space: "trusted.overlay.", Opaque: 1, Whiteouts: 2, Root: true, Moved: 1, Removed: 1, Inherited: 1},
	}
}

func TestDecodeRefuses(t *testing.T) {
	whole, err := Encode(committed())
	if err != nil {
		t.Fatal(err)
	}
	reseal := func(edit func(b []byte)) []byte {
		b := bytes.Clone(whole)
		edit(b)
		sum := checksum(b)
		b[12], b[13], b[14], b[15] = byte(sum), byte(sum>>8), byte(sum>>16), byte(sum>>24)
		return b
	}
	for name, c := range map[string]struct {
		b    []byte
		want error
	}{
		"nothing":           {nil, ErrCorrupt},
		"half a header":     {whole[:10], ErrCorrupt},
		"short":             {whole[:len(whole)-1], ErrCorrupt},
		"long":              {append(bytes.Clone(whole), 0), ErrCorrupt},
		"zeroes":            {make([]byte, len(whole)), ErrCorrupt},
		"newer version":     {reseal(func(b []byte) { b[4] = 2 }), ErrNewer},
		"version 0":         {reseal(func(b []byte) { b[4] = 0 }), ErrCorrupt},
		"reserved byte set": {reseal(func(b []byte) { b[6] = 1 }), ErrCorrupt},
		"not JSON":          {reseal(func(b []byte) { b[recordHeader] = '[' }), ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			if err := Decode(c.b, new(Record)); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
	t.Run("any bit flipped", func(t *testing.T) {
		for i := range len(whole) * 8 {
			b := bytes.Clone(whole)
			b[i/8] ^= 1 << (i % 8)
			if err := Decode(b, new(Record)); !errors.Is(err, ErrCorrupt) {
				t.Fatalf("bit %d: got %v, want ErrCorrupt", i, err)
			}
		}
	})
}

func FuzzDecode(f *testing.F) {
	whole, err := Encode(committed())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add(whole[:recordHeader])
	f.Fuzz(func(t *testing.T, b []byte) {
		var e Record
		if err := Decode(b, &e); err != nil {
			if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNewer) {
				t.Errorf("unclassified error %v", err)
			}
			return
		}
		again, err := Encode(e)
		if err != nil {
			t.Fatal(err)
		}
		var e2 Record
		if err := Decode(again, &e2); err != nil || !e2.Created.Equal(e.Created) {
			t.Errorf("does not survive a second round: %v", err)
		}
	})
}
