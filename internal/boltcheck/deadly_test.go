package boltcheck

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
// file in a child that may well die of it. This is how the child ends otherwise.
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

func readInChild(as, path string) int {
	err := limitMemory()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return childFailed
	}
	if as == "bbolt" {
		err = readWithBbolt(path)
	} else {
		var f *os.File
		if f, err = os.Open(path); err == nil {
			err = Check(f, errDamaged)
		}
	}
	switch {
	case err == nil:
		return childRead
	case errors.Is(err, errDamaged):
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

// readWithBbolt reads all of a database, as storage does after Check.
func readWithBbolt(path string) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%v: %w", p, errDamaged)
		}
	}()
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, PreLoadFreelist: true})
	if err != nil {
		return err
	}
	err = db.View(func(tx *bolt.Tx) error {
		return tx.ForEach(func(_ []byte, b *bolt.Bucket) error { return readAll(b) })
	})
	return errors.Join(err, db.Close()) // after a panic it would wait for the transaction
}

func readAll(b *bolt.Bucket) error {
	return b.ForEach(func(k, v []byte) error {
		if nested := b.Bucket(k); v == nil && nested != nil {
			return readAll(nested)
		}
		return nil
	})
}

// child reads a file in a child process and returns how that ended, and the first
// line of its output. After the time, it is killed: its exit status is -1.
func child(t *testing.T, as, path string, atMost time.Duration) (code int, output string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), atMost)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0], path)
	cmd.Env = append(os.Environ(), readAs+"="+as, "GOTRACEBACK=none")
	out, err := cmd.CombinedOutput()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	output, _, _ = strings.Cut(string(out), "\n")
	return cmd.ProcessState.ExitCode(), output
}

// TestDeadlyPages: damage by which bbolt uses up all memory, and there is no panic
// to be caught, or goes round for ever. A child in which bbolt reads by itself
// comes to no good end; Check names what is wrong.
func TestDeadlyPages(t *testing.T) {
	path, healthy := manyPages(t)
	for _, as := range []string{"bbolt", "Check"} {
		if code, output := child(t, as, path, time.Minute); code != childRead {
			t.Fatalf("%s reads a healthy database: exit status %d: %s", as, code, output)
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
			path := filepath.Join(t.TempDir(), fileName)
			if err := os.WriteFile(path, p.b, 0o600); err != nil {
				t.Fatal(err)
			}
			if code, output := child(t, "Check", path, time.Minute); code != childDamaged {
				t.Errorf("Check: exit status %d, want %d: %s", code, childDamaged, output)
			} else {
				t.Log("Check:", output)
			}
			code, output := child(t, "bbolt", path, 2*time.Second)
			if code == childRead || code == childDamaged || code == childFailed {
				t.Errorf("bbolt by itself: exit status %d: %s: not deadly any more, is Check needed?", code, output)
			} else {
				t.Log("bbolt by itself:", output)
			}
		})
	}
}
