package storage

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	cstorage "github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
)

func open(t *testing.T, root string) *DB {
	t.Helper()
	db, err := Open(t.Context(), root, Options{History: 3})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	return db
}

// commitOne makes a committed row with its journal entry, as the snapshotter
// does.
func commitOne(t *testing.T, db *DB, name, parent string) uint64 {
	t.Helper()
	var id uint64
	err := db.Update(t.Context(), func(ctx context.Context, j *Journal) (err error) {
		if _, err := cstorage.CreateSnapshot(ctx, snapshots.KindActive, "key of "+name, parent); err != nil {
			return err
		}
		if id, _, _, err = Info(ctx, "key of "+name); err != nil {
			return err
		}
		if err := j.PutOpen(OpenEntry{ID: id, Key: "key of " + name}); err != nil {
			return err
		}
		if err := Commit(ctx, "key of "+name, name, snapshots.Usage{Size: 1, Inodes: 2}); err != nil {
			return err
		}
		return j.Commit(&CommitEntry{ID: id, Name: name, Parent: parent})
	})
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func remove(t *testing.T, db *DB, name string, id uint64) {
	t.Helper()
	if err := db.Update(t.Context(), func(ctx context.Context, j *Journal) error {
		return errors.Join(Remove(ctx, name), j.Remove(id, time.Now()))
	}); err != nil {
		t.Fatal(err)
	}
}

func names(t *testing.T, db *DB) (rows, committed, history []string) {
	t.Helper()
	err := db.View(t.Context(), func(ctx context.Context, j *Journal) error {
		return errors.Join(
			Walk(ctx, func(_ uint64, info snapshots.Info, _ snapshots.Usage) error {
				rows = append(rows, info.Name)
				return nil
			}),
			j.EachCommitted(func(e CommitEntry) error { committed = append(committed, e.Name); return nil }),
			j.EachRemoved(func(e CommitEntry) error { history = append(history, e.Name); return nil }),
		)
	})
	if err != nil {
		t.Fatal(err)
	}
	return rows, committed, history
}

// TestTransactorIsBoltTx guards the seam on which the journal rests; see boltTx.
func TestTransactorIsBoltTx(t *testing.T) {
	ms, err := cstorage.NewMetaStore(filepath.Join(t.TempDir(), FileName))
	if err != nil {
		t.Fatal(err)
	}
	defer ms.Close()
	_, trans, err := ms.TransactionContext(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	defer trans.Rollback()
	if _, err := boltTx(trans); err != nil {
		t.Fatalf("CONTAINERD CHANGED: %v. Rows and journal no longer share one commit (I1, I3); find another way before you upgrade.", err)
	}
}

func TestRowsAndJournalShareOneCommit(t *testing.T) {
	root := t.TempDir()
	db := open(t, root)
	commitOne(t, db, "a", "")
	boom := errors.New("boom")
	err := db.WithTransaction(
		BeforeCommit(t.Context(), func(_ context.Context, j *Journal) error {
			return errors.Join(j.Commit(&CommitEntry{ID: 99, Name: "ghost"}), boom)
		}), true,
		func(ctx context.Context) error {
			_, err := cstorage.CreateSnapshot(ctx, snapshots.KindActive, "ghost", "a")
			return err
		})
	if !errors.Is(err, boom) {
		t.Fatalf("got %v, want the hook's error", err)
	}
	if rows, committed, _ := names(t, db); fmt.Sprint(rows, committed) != "[a] [a]" {
		t.Errorf("after a roll-back: rows %v, journal %v", rows, committed)
	}
}

func TestHistoryIsBounded(t *testing.T) {
	db := open(t, t.TempDir())
	keep := commitOne(t, db, "kept", "")
	for i := range 10 {
		name := fmt.Sprint("gone-", i)
		remove(t, db, name, commitOne(t, db, name, "kept"))
	}
	rows, committed, history := names(t, db)
	if got := fmt.Sprint(rows, committed, history); got != "[kept] [kept] [gone-7 gone-8 gone-9]" {
		t.Errorf("got %s", got)
	}
	if err := db.View(t.Context(), func(_ context.Context, j *Journal) error {
		_, err := j.GetCommitted(keep)
		return err
	}); err != nil {
		t.Error(err)
	}
}

func TestEmptyDatabaseAnswers(t *testing.T) {
	root := t.TempDir()
	db := open(t, root)
	// containerd's own store answers NotFound to a walk before its first row.
	if rows, _, _ := names(t, db); len(rows) != 0 {
		t.Errorf("rows %v", rows)
	}
	left, err := filepath.Glob(filepath.Join(root, "*"))
	if err != nil || len(left) != 1 {
		t.Errorf("birth left %v, %v", left, err)
	}
}

// TestOpenRefuses: the error is clear, and nothing is touched.
func TestOpenRefuses(t *testing.T) {
	whole := func(t *testing.T, root string) string {
		db := open(t, root)
		commitOne(t, db, "a", "")
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		return db.Path()
	}
	journalByte := func(t *testing.T, path string, edit func(*bolt.Bucket) error) {
		t.Helper()
		b, err := bolt.Open(path, 0o600, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(b.Update(func(tx *bolt.Tx) error { return edit(tx.Bucket(bucketJournal)) }), b.Close()); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		damage func(t *testing.T, root string)
		want   error
	}{
		"garbage": {func(t *testing.T, root string) {
			write(t, filepath.Join(root, FileName), bytes.Repeat([]byte("garbage "), 1<<14))
		}, ErrDamaged},
		"empty": {func(t *testing.T, root string) { write(t, filepath.Join(root, FileName), nil) }, ErrDamaged},
		"a directory": {func(t *testing.T, root string) {
			if err := os.Mkdir(filepath.Join(root, FileName), 0o700); err != nil {
				t.Fatal(err)
			}
		}, ErrDamaged},
		"cut to one page": {func(t *testing.T, root string) {
			if err := os.Truncate(whole(t, root), 4096); err != nil {
				t.Fatal(err)
			}
		}, ErrDamaged},
		"cut to three pages": {func(t *testing.T, root string) {
			if err := os.Truncate(whole(t, root), 3*4096); err != nil {
				t.Fatal(err)
			}
		}, ErrDamaged},
		"journal entry flipped": {func(t *testing.T, root string) {
			journalByte(t, whole(t, root), func(b *bolt.Bucket) error {
				k, v := b.Bucket(bucketCommitted).Cursor().First()
				v = bytes.Clone(v)
				v[20] ^= 4
				return b.Bucket(bucketCommitted).Put(k, v)
			})
		}, ErrDamaged},
		"newer journal": {func(t *testing.T, root string) {
			journalByte(t, whole(t, root), func(b *bolt.Bucket) error { return b.Put(keyVersion, []byte{journalVersion + 1}) })
		}, layout.ErrNewer},
		"newer record": {func(t *testing.T, root string) {
			journalByte(t, whole(t, root), func(b *bolt.Bucket) error {
				r, err := layout.Encode(golden())
				if err != nil {
					return err
				}
				r[4] = 9
				castagnoli := crc32.MakeTable(crc32.Castagnoli)
				binary.LittleEndian.PutUint32(r[12:], crc32.Update(crc32.Checksum(r[:12], castagnoli), castagnoli, r[16:]))
				return b.Bucket(bucketCommitted).Put(idKey(1000), r)
			})
		}, layout.ErrNewer},
		"missing beside snapshots": {func(t *testing.T, root string) {
			if err := os.MkdirAll(filepath.Join(root, "snapshots", "12"), 0o700); err != nil {
				t.Fatal(err)
			}
		}, ErrMissing},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			c.damage(t, root)
			before := tree(t, root)
			_, err := Open(t.Context(), root, Options{})
			if !errors.Is(err, c.want) {
				t.Fatalf("got %v, want %v", err, c.want)
			}
			if !strings.Contains(err.Error(), filepath.Join(root, FileName)) {
				t.Errorf("%v: does not name the file", err)
			}
			if after := tree(t, root); after != before {
				t.Errorf("changed:\n%s\nbefore:\n%s", after, before)
			}
		})
	}
}

// TestOpenSurvivesAnyDamage: whatever is wrong with the file, Open answers; it
// does not panic, fault or hang.
func TestOpenSurvivesAnyDamage(t *testing.T) {
	root := t.TempDir()
	db := open(t, root)
	for i := range 40 {
		commitOne(t, db, fmt.Sprint("layer-", i), "")
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(db.Path())
	if err != nil {
		t.Fatal(err)
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	refused := 0
	for range 300 {
		b := bytes.Clone(whole)
		switch r.IntN(3) {
		case 0: // a page of noise
			page := r.IntN(len(b) / 4096)
			for i := range 4096 {
				b[page*4096+i] = byte(r.Uint32())
			}
		case 1: // a few flipped bytes
			for range 1 + r.IntN(8) {
				b[r.IntN(len(b))] ^= byte(1 + r.IntN(255))
			}
		case 2: // a cut
			b = b[:r.IntN(len(b))]
		}
		// A new file each time: when bbolt panics in its Open, its lock on the
		// old one lasts until the process ends, as it would in the daemon.
		if err := os.Remove(filepath.Join(root, FileName)); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(root, FileName), b)
		damaged, err := Open(t.Context(), root, Options{})
		if err != nil {
			if !errors.Is(err, ErrDamaged) && !errors.Is(err, layout.ErrNewer) {
				t.Fatalf("unclassified error: %v", err)
			}
			refused++
			continue
		}
		if err := damaged.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if refused == 0 {
		t.Error("no damage was noticed")
	}
}

func TestOpenIsExclusive(t *testing.T) {
	root := t.TempDir()
	open(t, root)
	start := time.Now()
	_, err := Open(t.Context(), root, Options{})
	if !errors.Is(err, ErrLocked) {
		t.Errorf("got %v, want ErrLocked", err)
	}
	if took := time.Since(start); took > 3*lockWait {
		t.Errorf("took %s", took)
	}
}

// TestOpenWaitsForAVerb: a daemon that starts beside a verb, for which it took a lock
// for longer than a daemon waits for another one, starts when the verb has ended. A
// second verb does not wait, and a wait ends with its context.
func TestOpenWaitsForAVerb(t *testing.T) {
	root := t.TempDir()
	verb, err := Open(t.Context(), root, Options{Passing: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), root, Options{Passing: true}); !errors.Is(err, ErrLocked) {
		t.Errorf("a second verb: got %v, want ErrLocked", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Open(ctx, root, Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("stopped: got %v", err)
	}
	waits := make(chan struct{})
	opened := make(chan error)
	go func() {
		db, err := Open(t.Context(), root, Options{OnWait: func() { close(waits) }})
		if err == nil {
			err = db.Close()
		}
		opened <- err
	}()
	select {
	case <-waits:
	case err := <-opened:
		t.Fatalf("did not wait: %v", err)
	}
	if err := verb.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-opened; err != nil {
		t.Error(err)
	}
}

// TestLeftoversOfACrash: files of a birth or a rewrite that was cut short are
// not the database.
func TestLeftoversOfACrash(t *testing.T) {
	root := t.TempDir()
	for _, suffix := range []string{".new", ".rewrite"} {
		write(t, filepath.Join(root, FileName+suffix), []byte("half"))
	}
	db := open(t, root)
	commitOne(t, db, "a", "")
	if left, _ := filepath.Glob(filepath.Join(root, FileName+".*")); len(left) != 0 {
		t.Errorf("left %v", left)
	}
}

// TestUpgrade: a database of containerd's own snapshotter gets a journal.
func TestUpgrade(t *testing.T) {
	root := t.TempDir()
	ms, err := cstorage.NewMetaStore(filepath.Join(root, FileName))
	if err != nil {
		t.Fatal(err)
	}
	err = ms.WithTransaction(t.Context(), true, func(ctx context.Context) error {
		for _, key := range []string{"k1", "k2"} {
			if _, err := cstorage.CreateSnapshot(ctx, snapshots.KindActive, key, ""); err != nil {
				return err
			}
		}
		return Commit(ctx, "k1", "committed", snapshots.Usage{})
	})
	if err := errors.Join(err, ms.Close()); err != nil {
		t.Fatal(err)
	}
	db := open(t, root)
	err = db.View(t.Context(), func(_ context.Context, j *Journal) error {
		c, err := j.GetCommitted(1)
		if err != nil || c.Strategy != StrategyUnknown || c.Name != "committed" {
			t.Errorf("committed entry %+v, %v", c, err)
		}
		// Whether it is an extraction is not known here.
		if o, err := j.GetOpen(2); !errors.Is(err, ErrNoEntry) {
			t.Errorf("open entry %+v, %v", o, err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestRewriteKeepsEverything(t *testing.T) {
	root := t.TempDir()
	db := open(t, root)
	commitOne(t, db, "a", "")
	commitOne(t, db, "b", "a")
	db.broken = ErrBroken
	if err := db.Update(t.Context(), func(context.Context, *Journal) error { return nil }); !errors.Is(err, ErrBroken) {
		t.Fatalf("a broken database was written: %v", err)
	}
	if err := db.Rewrite(t.Context()); err != nil {
		t.Fatal(err)
	}
	commitOne(t, db, "c", "b")
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	db = open(t, root)
	if rows, committed, _ := names(t, db); fmt.Sprint(rows, committed) != "[a b c] [a b c]" {
		t.Errorf("rows %v, journal %v", rows, committed)
	}
	if err := db.WithTransaction(t.Context(), true, func(ctx context.Context) error { return Remove(ctx, "a") }); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("children are forgotten: %v", err)
	}
}

func TestRebuildFromRows(t *testing.T) {
	root := t.TempDir()
	write(t, filepath.Join(root, FileName), []byte("damaged"))
	created := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	row := func(id uint64, kind snapshots.Kind, name, parent string) Row {
		return Row{ID: id, Info: snapshots.Info{Kind: kind, Name: name, Parent: parent, Created: created, Updated: created, Labels: map[string]string{"l": name}}}
	}
	base := row(40, snapshots.KindCommitted, "base", "")
	base.Commit = CommitEntry{ID: 40, Name: "base", Strategy: StrategyRebuilt}
	box := row(7, snapshots.KindActive, "container", "base")
	box.Open = OpenEntry{ID: 7, Key: "container"}
	aside, err := Rebuild(t.Context(), root, "x", []Row{base, box, row(9, snapshots.KindView, "view", "base")})
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(aside); err != nil || string(b) != "damaged" {
		t.Errorf("the old file is %q, %v", b, err)
	}
	db := open(t, root)
	err = db.View(t.Context(), func(ctx context.Context, j *Journal) error {
		id, info, _, err := Info(ctx, "base")
		if err != nil || id != 40 || !info.Created.Equal(created) || info.Labels["l"] != "base" {
			t.Errorf("base: %d %+v %v", id, info, err)
		}
		if id, info, _, err = Info(ctx, "container"); err != nil || id != 7 || info.Kind != snapshots.KindActive || info.Parent != "base" {
			t.Errorf("container: %d %+v %v", id, info, err)
		}
		if _, err := j.GetOpen(7); err != nil {
			t.Error(err)
		}
		_, err = j.GetCommitted(40)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if id := commitOne(t, db, "next", "base"); id != 41 {
		t.Errorf("the next id is %d, want 41", id)
	}
}

func write(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// tree lists every file with its content's size and a sum, to see changes.
func tree(t *testing.T, root string) string {
	t.Helper()
	var s strings.Builder
	err := filepath.Walk(root, func(path string, fi os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		fmt.Fprintf(&s, "%s %s %d", path, fi.Mode(), fi.Size())
		if fi.Mode().IsRegular() {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&s, " %x", bytes.Clone(b))
		}
		s.WriteString("\n")
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return s.String()
}
