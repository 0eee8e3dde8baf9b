package storage

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// readAs is the variable with which the tests start themselves again, to read a
// root in a child that may well die of it. This is how the child ends otherwise.
const (
	readAs = "DURABLE_SNAPSHOTTER_TEST_READ_AS"

	childRead    = 10
	childDamaged = 11
	childFailed  = 12
)

// childMemory is what a child may use beyond what it begins with, which is a lot
// with the race detector: enough to read a healthy database, and soon used up by
// a cursor that goes round.
const childMemory = 512 << 20

func TestMain(m *testing.M) {
	if as := os.Getenv(readAs); as != "" {
		os.Exit(readInChild(as, os.Args[len(os.Args)-1]))
	}
	os.Exit(m.Run())
}

func readInChild(as, root string) int {
	err := limitMemory()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return childFailed
	}
	if as == "bbolt" {
		err = readWithBbolt(filepath.Join(root, FileName))
	} else {
		var db *DB
		if db, err = Open(context.Background(), root, Options{}); err == nil {
			err = db.Close()
		}
	}
	switch {
	case err == nil:
		return childRead
	case errors.Is(err, ErrDamaged):
		fmt.Fprintln(os.Stderr, err)
		return childDamaged
	}
	fmt.Fprintln(os.Stderr, err)
	return childFailed
}

func limitMemory() error {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	var kib uint64
	_, data, _ := strings.Cut(string(status), "VmData:")
	if _, err := fmt.Sscan(data, &kib); err != nil {
		return fmt.Errorf("VmData: %w", err)
	}
	limit := kib<<10 + childMemory
	return unix.Setrlimit(unix.RLIMIT_DATA, &unix.Rlimit{Cur: limit, Max: limit})
}

// readWithBbolt reads a database as verify does, but for checkPages.
func readWithBbolt(path string) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%v: %w", p, ErrDamaged)
		}
	}()
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, PreLoadFreelist: true})
	if err != nil {
		return err
	}
	return db.View(func(tx *bolt.Tx) error {
		return tx.ForEach(func(_ []byte, b *bolt.Bucket) error { return readAll(b) })
	})
}

// child reads root in a child process and returns how that ended, and the first
// line of what it said. After the time, it is killed: its exit status is -1.
func child(t *testing.T, as, root string, atMost time.Duration) (code int, said string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), atMost)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0], root)
	cmd.Env = append(os.Environ(), readAs+"="+as, "GOTRACEBACK=none")
	out, err := cmd.CombinedOutput()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	said, _, _ = strings.Cut(string(out), "\n")
	return cmd.ProcessState.ExitCode(), said
}

// TestDeadlyPages: damage by which bbolt uses up all memory, and there is no panic
// to be caught, or goes round for ever. A child in which bbolt reads by itself
// comes to no good end; Open says what is wrong.
func TestDeadlyPages(t *testing.T) {
	root, healthy := manyPages(t)
	for _, as := range []string{"bbolt", "Open"} {
		if code, said := child(t, as, root, time.Minute); code != childRead {
			t.Fatalf("%s reads a healthy database: exit status %d: %s", as, code, said)
		}
	}
	for name, damage := range map[string]func(*pagesOf){
		"a branch page leads to itself at its beginning": func(p *pagesOf) { put64(p.child(p.top, 0), p.top) },
		"a branch page leads to itself at its end":       func(p *pagesOf) { put64(p.child(p.top, -1), p.top) },
		"a branch page leads to the root of its bucket":  func(p *pagesOf) { put64(p.child(p.below, 3), p.top) },
		"a branch page without children leads to itself": func(p *pagesOf) {
			put64(p.child(p.top, 0), p.top)
			binary.NativeEndian.PutUint16(p.page(p.top)[10:], 0)
		},
		"a nested bucket is its own ancestor": func(p *pagesOf) { put64(p.b[p.committed:], p.journal) },
		"an endless list of free pages": func(p *pagesOf) {
			binary.NativeEndian.PutUint16(p.page(p.freelist)[10:], 0xFFFF)
			put64(p.page(p.freelist)[pageHeader:], 1<<33)
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := *healthy
			p.b = bytes.Clone(healthy.b)
			damage(&p)
			root := t.TempDir()
			write(t, filepath.Join(root, FileName), p.b)
			if code, said := child(t, "Open", root, time.Minute); code != childDamaged {
				t.Errorf("Open: exit status %d, want %d: %s", code, childDamaged, said)
			} else {
				t.Log("Open:", said)
			}
			code, said := child(t, "bbolt", root, 5*time.Second)
			if code == childRead || code == childDamaged || code == childFailed {
				t.Errorf("bbolt by itself: exit status %d: %s: not deadly any more, is checkPages needed?", code, said)
			} else {
				t.Log("bbolt by itself:", said)
			}
		})
	}
}
