package storage

import (
	"bytes"
	"flag"
	"os"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
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
	got, err := layout.Encode(golden())
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
	if err := layout.Decode(want, &e); err != nil {
		t.Fatal(err)
	}
	if e != golden() {
		t.Errorf("decoded %+v\n   want %+v", e, golden())
	}
}
