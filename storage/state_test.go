package storage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/durable-snapshotter/durable-snapshotter/internal/finding"
)

// fullState, fullRun and fullScrub are entries with every field set.
func fullState(id uint64) StateEntry {
	healed := golden()
	healed.Epoch = 3
	return StateEntry{
		ID: id, State: StateDamaged, Epoch: 4,
		Checked: time.Date(2026, 11, 21, 19, 0, 0, 7, time.UTC), Deep: time.Date(2026, 11, 20, 1, 2, 3, 0, time.UTC),
		Findings: []finding.Finding{{Path: "bin/\nsü", What: "mode", Want: "04755", Have: "0755"}, {Path: ".", What: "missing"}},
		Reason:   "no blob", Contents: "sha256:" + hex64, Healing: &healed,
		Depth: DepthContent, Tree: "sha256:" + hex64, Reported: true, Attempts: 2,
	}
}

func fullRun() Run {
	return Run{
		BootID: "8f3f2a51-0000-4000-8000-000000000000", RunID: "0011223344556677", Epoch: 5,
		Started: time.Date(2026, 11, 21, 1, 0, 0, 0, time.UTC), Stopped: time.Date(2026, 11, 21, 2, 0, 0, 9, time.UTC),
		Brake: "12 of 20 layers were found damaged within a day", BrakeHeals: true, SnapshotsMounted: true, ImagesEpoch: 4,
	}
}

func fullScrub() Scrub {
	return Scrub{
		Depth: "content", Started: time.Date(2026, 11, 21, 1, 0, 0, 0, time.UTC), Finished: time.Date(2026, 11, 21, 2, 0, 0, 0, time.UTC),
		Next: 12, Verified: 9, Damaged: 1,
	}
}

// TestFullEntriesAreFull: a new field must be set above, or the tests would not
// notice that it gets lost.
func TestFullEntriesAreFull(t *testing.T) {
	for _, v := range []any{fullState(1), fullRun(), fullScrub()} {
		for i, r := 0, reflect.ValueOf(v); i < r.NumField(); i++ {
			if r.Field(i).IsZero() {
				t.Errorf("%s.%s is not set", r.Type(), r.Type().Field(i).Name)
			}
		}
	}
}

// TestDepthCovers: damage is disproved by what compares at least as much.
func TestDepthCovers(t *testing.T) {
	order := []Depth{"", DepthRoot, DepthMetadata, DepthContent}
	for i, d := range order {
		for j, o := range order {
			if got := d.Covers(o); got != (i >= j) {
				t.Errorf("%q covers %q: %t", d, o, got)
			}
		}
	}
}

// edit is db.Update, and a failed test when that fails.
func edit(t *testing.T, db *DB, fn func(*Journal) error) {
	t.Helper()
	if err := db.Update(t.Context(), func(_ context.Context, j *Journal) error { return fn(j) }); err != nil {
		t.Fatal(err)
	}
}

// inView is db.View, and a failed test when that fails.
func inView(t *testing.T, db *DB, fn func(*Journal) error) {
	t.Helper()
	if err := db.View(t.Context(), func(_ context.Context, j *Journal) error { return fn(j) }); err != nil {
		t.Fatal(err)
	}
}

// wantEntries compares the state of snapshot id, the run and the scrub.
func wantEntries(t *testing.T, j *Journal, state StateEntry, run Run, scrub Scrub) error {
	t.Helper()
	got, err := j.GetState(state.ID)
	if err != nil || !reflect.DeepEqual(got, state) {
		t.Errorf("state %+v, %v\nwant %+v", got, err, state)
	}
	var ids []uint64
	if err := j.EachState(func(e StateEntry) error { ids = append(ids, e.ID); return nil }); err != nil || fmt.Sprint(ids) != fmt.Sprint([]uint64{state.ID}) {
		t.Errorf("states of %v, %v", ids, err)
	}
	if got, err := j.Run(); err != nil || got != run {
		t.Errorf("run %+v, %v\nwant %+v", got, err, run)
	}
	if got, err := j.Scrub(); err != nil || got != scrub {
		t.Errorf("scrub %+v, %v\nwant %+v", got, err, scrub)
	}
	return nil
}

func TestStateRunAndScrubAreKept(t *testing.T) {
	root := t.TempDir()
	db := open(t, root)
	id := commitOne(t, db, "a", "")
	inView(t, db, func(j *Journal) error {
		if s, err := j.GetState(id); !errors.Is(err, ErrNoEntry) {
			t.Errorf("state before the first verification: %+v, %v", s, err)
		}
		run, err := j.Run()
		scrub, err2 := j.Scrub()
		if run != (Run{}) || scrub != (Scrub{}) {
			t.Errorf("of a new database: %+v, %+v", run, scrub)
		}
		return errors.Join(err, err2)
	})
	for range 2 { // replaced, not added
		edit(t, db, func(j *Journal) error {
			return errors.Join(j.PutState(fullState(id)), j.PutRun(fullRun()), j.PutScrub(fullScrub()))
		})
	}
	if err := db.Rewrite(t.Context()); err != nil {
		t.Fatal(err)
	}
	inView(t, db, func(j *Journal) error { return wantEntries(t, j, fullState(id), fullRun(), fullScrub()) })
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	inView(t, open(t, root), func(j *Journal) error { return wantEntries(t, j, fullState(id), fullRun(), fullScrub()) })
}

// TestRemoveDropsTheState: otherwise the states of all snapshots that ever were
// would stay.
func TestRemoveDropsTheState(t *testing.T) {
	db := open(t, t.TempDir())
	a, b := commitOne(t, db, "a", ""), commitOne(t, db, "b", "")
	edit(t, db, func(j *Journal) error {
		return errors.Join(j.PutState(fullState(a)), j.PutState(fullState(b)), j.PutRun(fullRun()), j.PutScrub(fullScrub()))
	})
	remove(t, db, "a", a)
	inView(t, db, func(j *Journal) error {
		if s, err := j.GetState(a); !errors.Is(err, ErrNoEntry) {
			t.Errorf("state of what was removed: %+v, %v", s, err)
		}
		return wantEntries(t, j, fullState(b), fullRun(), fullScrub())
	})
}

func TestReplaceKeepsTheSequence(t *testing.T) {
	db := open(t, t.TempDir())
	a := commitOne(t, db, "a", "")
	commitOne(t, db, "b", "a")
	healed := CommitEntry{Sequence: 77, ID: a, Name: "a", Digest: "sha256:" + hex64, Strategy: StrategyHealed}
	edit(t, db, func(j *Journal) error { return j.Replace(healed) })
	c := commitOne(t, db, "c", "b")
	inView(t, db, func(j *Journal) error {
		healed.Sequence = 1
		if e, err := j.GetCommitted(a); err != nil || e != healed {
			t.Errorf("got %+v, %v\nwant %+v", e, err, healed)
		}
		if e, err := j.GetCommitted(c); err != nil || e.Sequence != 3 {
			t.Errorf("the commit after it: %+v, %v, want sequence 3", e, err)
		}
		return nil
	})
	err := db.Update(t.Context(), func(_ context.Context, j *Journal) error { return j.Replace(CommitEntry{ID: 99, Name: "ghost"}) })
	if !errors.Is(err, ErrNoEntry) {
		t.Errorf("an entry that does not exist: %v, want ErrNoEntry", err)
	}
}

// TestEntriesAfterOpen: what Open has decoded is used until something is written, and not
// after it.
func TestEntriesAfterOpen(t *testing.T) {
	root := t.TempDir()
	db := open(t, root)
	id := commitOne(t, db, "layer", "")
	edit(t, db, func(j *Journal) error { return j.PutState(fullState(id)) })
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	db = open(t, root)
	if known := db.known.Load(); known == nil || len(known.committed) != 1 || len(known.states) != 1 {
		t.Fatalf("Open has decoded %+v", known)
	}
	digest := func() (have string, state State) {
		inView(t, db, func(j *Journal) error {
			e, err := j.GetCommitted(id)
			s, err2 := j.GetState(id)
			have, state = e.Digest, s.State
			return errors.Join(err, err2)
		})
		return have, state
	}
	if _, state := digest(); state != fullState(id).State {
		t.Errorf("state %q", state)
	}
	edit(t, db, func(j *Journal) error {
		e, err := j.GetCommitted(id)
		e.Digest = "another"
		return errors.Join(err, j.Replace(e), j.PutState(StateEntry{ID: id, State: StateUnverified}))
	})
	if have, state := digest(); have != "another" || state != StateUnverified {
		t.Errorf("after a write: digest %q, state %q", have, state)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
}

// inJournal changes the bucket journal of a closed database, past all our code.
func inJournal(t *testing.T, path string, fn func(*bolt.Bucket) error) {
	t.Helper()
	b, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(b.Update(func(tx *bolt.Tx) error { return fn(tx.Bucket(bucketJournal)) }), b.Close()); err != nil {
		t.Fatal(err)
	}
}

// versionOne makes a database as the release with journal version 1 left it: a
// chain, an active snapshot, and something in the history.
func versionOne(t *testing.T) (root, path string) {
	t.Helper()
	root = t.TempDir()
	db := open(t, root)
	commitOne(t, db, "a", "")
	commitOne(t, db, "b", "a")
	remove(t, db, "gone", commitOne(t, db, "gone", "b"))
	edit(t, db, func(j *Journal) error { return j.PutOpen(OpenEntry{ID: 9, Key: "container", Parent: "b"}) })
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	inJournal(t, db.Path(), func(b *bolt.Bucket) error {
		return errors.Join(b.DeleteBucket(bucketStates), b.Delete(keyRun), b.Delete(keyScrub), b.Put(keyVersion, []byte{1}))
	})
	return root, db.Path()
}

// wantOfVersionOne compares what versionOne has put into its journal.
func wantOfVersionOne(t *testing.T, j *Journal) error {
	t.Helper()
	var got []string
	add := func(kind string) func(CommitEntry) error {
		return func(e CommitEntry) error {
			got = append(got, fmt.Sprintf("%s %d %s of %q, number %d", kind, e.ID, e.Name, e.Parent, e.Sequence))
			return nil
		}
	}
	err := errors.Join(j.EachCommitted(add("committed")), j.EachRemoved(add("removed")),
		j.EachOpen(func(e OpenEntry) error {
			got = append(got, fmt.Sprintf("open %d %s of %q", e.ID, e.Key, e.Parent))
			return nil
		}),
		j.EachState(func(e StateEntry) error { got = append(got, fmt.Sprint("state ", e)); return nil }))
	// containerd has given out the ids, from 2: the birth has used the first.
	want := []string{
		`committed 2 a of "", number 1`, `committed 3 b of "a", number 2`, `removed 4 gone of "b", number 3`, `open 9 container of "b"`,
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("the journal has\n%q, want\n%q", got, want)
	}
	return err
}

func TestUpgradeOfVersion1(t *testing.T) {
	root, path := versionOne(t)
	db := open(t, root)
	if rows, _, _ := names(t, db); fmt.Sprint(rows) != "[a b]" {
		t.Errorf("rows %v", rows)
	}
	inView(t, db, func(j *Journal) error {
		if run, err := j.Run(); err != nil || run != (Run{}) {
			t.Errorf("run %+v, %v", run, err)
		}
		return wantOfVersionOne(t, j)
	})
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	inJournal(t, path, func(b *bolt.Bucket) error {
		if v := b.Get(keyVersion); !bytes.Equal(v, []byte{journalVersion}) {
			t.Errorf("the version is %v, want %d", v, journalVersion)
		}
		return b.Put(keyVersion, []byte{2}) // with the same buckets
	})
	db = open(t, root)
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	inJournal(t, path, func(b *bolt.Bucket) error {
		if v := b.Get(keyVersion); !bytes.Equal(v, []byte{journalVersion}) {
			t.Errorf("the version is %v after the upgrade of version 2, want %d", v, journalVersion)
		}
		return nil
	})
	db = open(t, root)
	edit(t, db, func(j *Journal) error { return errors.Join(j.PutState(fullState(2)), j.PutRun(fullRun())) })
	inView(t, db, func(j *Journal) error { return wantEntries(t, j, fullState(2), fullRun(), Scrub{}) })
	if c := commitOne(t, db, "c", "b"); c != 5 {
		t.Errorf("the next id is %d, want 5", c)
	}
}

// TestReadOnlyOfVersion1: ReadOnly of the root of a daemon that was never started
// in this version finds no states, and changes nothing.
func TestReadOnlyOfVersion1(t *testing.T) {
	root, _ := versionOne(t)
	before := tree(t, root)
	err := ReadOnly(t.Context(), root, func(_ context.Context, j *Journal) error {
		if s, err := j.GetState(2); !errors.Is(err, ErrNoEntry) {
			t.Errorf("state %+v, %v, want ErrNoEntry", s, err)
		}
		run, err := j.Run()
		scrub, err2 := j.Scrub()
		if run != (Run{}) || scrub != (Scrub{}) {
			t.Errorf("run %+v, scrub %+v", run, scrub)
		}
		return errors.Join(err, err2, wantOfVersionOne(t, j))
	})
	if err != nil {
		t.Fatal(err)
	}
	if after := tree(t, root); after != before {
		t.Error("the database was written")
	}
}

// TestDamagedStates: what version 2 has added is damaged.
func TestDamagedStates(t *testing.T) {
	flip := func(b *bolt.Bucket, k []byte) error {
		v := bytes.Clone(b.Get(k))
		v[len(v)/2] ^= 0x10
		return b.Put(k, v)
	}
	for name, damage := range map[string]func(*bolt.Bucket) error{
		"a state":             func(b *bolt.Bucket) error { return flip(b.Bucket(bucketStates), idKey(2)) },
		"the key of a state":  func(b *bolt.Bucket) error { return b.Bucket(bucketStates).Put([]byte("2"), []byte("x")) },
		"an empty state":      func(b *bolt.Bucket) error { return b.Bucket(bucketStates).Put(idKey(2), nil) },
		"the run":             func(b *bolt.Bucket) error { return flip(b, keyRun) },
		"the scrub":           func(b *bolt.Bucket) error { return flip(b, keyScrub) },
		"no states at all":    func(b *bolt.Bucket) error { return b.DeleteBucket(bucketStates) },
		"version zero":        func(b *bolt.Bucket) error { return b.Put(keyVersion, []byte{0}) },
		"a version cut short": func(b *bolt.Bucket) error { return b.Put(keyVersion, []byte{0x80}) },
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			db := open(t, root)
			id := commitOne(t, db, "a", "")
			edit(t, db, func(j *Journal) error {
				return errors.Join(j.PutState(fullState(id)), j.PutRun(fullRun()), j.PutScrub(fullScrub()))
			})
			if err := db.Close(); err != nil {
				t.Fatal(err)
			}
			inJournal(t, db.Path(), damage)
			before, err := os.ReadFile(filepath.Join(root, FileName))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := Open(t.Context(), root, Options{}); !errors.Is(err, ErrDamaged) {
				t.Errorf("Open: %v, want ErrDamaged", err)
			}
			if err := ReadOnly(t.Context(), root, func(context.Context, *Journal) error { return nil }); !errors.Is(err, ErrDamaged) {
				t.Errorf("ReadOnly: %v, want ErrDamaged", err)
			}
			if after, err := os.ReadFile(filepath.Join(root, FileName)); err != nil || !bytes.Equal(after, before) {
				t.Errorf("the database was changed, %v", err)
			}
		})
	}
}
