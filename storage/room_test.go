package storage

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
)

// TestRoom: what a transaction is going to use of the file was written before, from the first
// one on, and after a Rewrite.
func TestRoom(t *testing.T) {
	db := open(t, t.TempDir())
	fatal := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check := func(when string) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); db.extending.Load(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("it is extended for ever")
			}
		}
		var used int64
		fatal(viewBolt(t.Context(), db.ms, func(_ context.Context, tx *bolt.Tx) error { used = tx.Size(); return nil }))
		f, err := os.Open(db.Path())
		fatal(err)
		defer f.Close()
		st, err := f.Stat()
		fatal(err)
		// Less, because a transaction may have used some since the check.
		if st.Size() < used+least/2 || st.Size() > used+2*growBy {
			t.Errorf("%s: %d bytes, and %d are used", when, st.Size(), used)
		}
		if hole, err := f.Seek(0, 4 /* SEEK_HOLE */); err != nil || hole != st.Size() {
			t.Errorf("%s: the first byte that was never written is %d of %d, %v", when, hole, st.Size(), err)
		}
	}
	check("new")
	for i := range 2000 {
		commitOne(t, db, fmt.Sprint("layer ", i), "")
		check(fmt.Sprint("after transaction ", i))
	}
	fatal(db.Rewrite(t.Context()))
	commitOne(t, db, "one more", "")
	check("rewritten")
}
