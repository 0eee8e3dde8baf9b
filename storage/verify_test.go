package storage

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	bolt "go.etcd.io/bbolt"
)

// TestLockedByAnother: pages that another process is writing are not damage.
func TestLockedByAnother(t *testing.T) {
	root := t.TempDir()
	db := open(t, root)
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	other, err := bolt.Open(db.Path(), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if _, err := Open(t.Context(), root, Options{}); !errors.Is(err, ErrLocked) || errors.Is(err, ErrDamaged) {
		t.Errorf("got %v, want ErrLocked", err)
	}
}

// TestOpenChecksPages: Open finds what internal/boltcheck finds and bbolt does not: pages
// that have lost their last element.
func TestOpenChecksPages(t *testing.T) {
	root := t.TempDir()
	db := open(t, root)
	for i := range 20 {
		commitOne(t, db, fmt.Sprint("layer-", i), "")
	}
	var page int
	if err := db.View(t.Context(), func(_ context.Context, j *Journal) error {
		page = int(j.committed.Root())
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(db.Path())
	if err != nil {
		t.Fatal(err)
	}
	count := whole[page*os.Getpagesize()+10:]
	binary.NativeEndian.PutUint16(count, binary.NativeEndian.Uint16(count)-1)
	write(t, db.Path(), whole)
	if _, err := Open(t.Context(), root, Options{}); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), fmt.Sprintf("page %d, of page", page)) {
		t.Errorf("Open: %v", err)
	}
	if err := ReadOnly(t.Context(), root, func(context.Context, *Journal) error { return nil }); !errors.Is(err, ErrDamaged) {
		t.Errorf("ReadOnly: %v", err)
	}
}
