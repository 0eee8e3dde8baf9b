package storage

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "rewrite the golden files; only for a new record version")

// golden is an entry with every field set. Its bytes are kept for ever: a
// database that holds them must stay readable.
func golden() CommitEntry {
	return CommitEntry{
		Sequence: 7, ID: 12, Name: "k8s.io/3/sha256:" + hex64, Namespace: "k8s.io", ChainID: "sha256:" + hex64,
		Parent: "k8s.io/2/sha256:" + hex64, DiffID: "sha256:" + hex64, Entries: 4, Bytes: 1 << 40, Digest: "sha256:" + hex64,
		Time: time.Date(2026, 11, 21, 12, 30, 0, 5, time.UTC), Strategy: StrategySyncfs,
		BootID: "8f3f2a51-0000-4000-8000-000000000000", RunID: "0011223344556677",
		Removed: time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC),
	}
}

const hex64 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func TestRecordGolden(t *testing.T) {
	const file = "testdata/record-v1.golden"
	got, err := Encode(golden())
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("the encoding changed: version 1 is fixed, make a version 2\n got %q\nwant %q", got, want)
	}
	var e CommitEntry
	if err := Decode(want, &e); err != nil {
		t.Fatal(err)
	}
	if e != golden() {
		t.Errorf("decoded %+v\n   want %+v", e, golden())
	}
}

func TestDecodeRefuses(t *testing.T) {
	whole, err := Encode(golden())
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
			if err := Decode(c.b, new(CommitEntry)); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
	t.Run("any bit flipped", func(t *testing.T) {
		for i := range len(whole) * 8 {
			b := bytes.Clone(whole)
			b[i/8] ^= 1 << (i % 8)
			if err := Decode(b, new(CommitEntry)); !errors.Is(err, ErrCorrupt) {
				t.Fatalf("bit %d: got %v, want ErrCorrupt", i, err)
			}
		}
	})
}

func FuzzDecode(f *testing.F) {
	whole, err := Encode(golden())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add(whole[:recordHeader])
	f.Fuzz(func(t *testing.T, b []byte) {
		var e CommitEntry
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
		var e2 CommitEntry
		if err := Decode(again, &e2); err != nil || !e2.Time.Equal(e.Time) {
			t.Errorf("does not survive a second round: %v", err)
		}
	})
}
