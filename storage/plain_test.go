package storage

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	cstorage "github.com/containerd/containerd/v2/core/snapshots/storage"

	"github.com/durable-snapshotter/durable-snapshotter/internal/finding"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
)

var (
	plainBefore = CommitEntry{Name: "k8s.io/1/sha256:00", Namespace: "k8s.io", Strategy: StrategySyncfs, BootID: "boot", RunID: "run"}
	plainStates = StateEntry{State: StateReady, Depth: DepthMetadata}
)

// plainly is what plain makes of a payload; taken means that encoding/json is not asked.
func plainly[E any](payload string, fields func(*plain, *E)) (e E, taken bool) {
	p := plain{left: []byte(payload), separator: '{'}
	fields(&p, &e)
	return e, p.taken()
}

func plainCommit(payload string) (CommitEntry, bool) {
	return plainly(payload, func(p *plain, e *CommitEntry) { p.commit(e, &plainBefore) })
}

func plainState(payload string) (StateEntry, bool) {
	return plainly(payload, func(p *plain, e *StateEntry) { p.state(e, &plainStates, "sha256:tree") })
}

// TestPlain: what the daemon writes for whole layers is decoded without encoding/json, and to the same.
func TestPlain(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 678, time.UTC)
	commit := CommitEntry{
		Sequence: 7, ID: 18446744073709551615, Name: "k8s.io/9/sha256:01", Namespace: "k8s.io", ChainID: "sha256:01", Parent: "k8s.io/1/sha256:00",
		DiffID: "sha256:02", Entries: 1, Bytes: 2, Digest: "sha256:tree", Time: at, Strategy: StrategySyncfsCursorLost, BootID: "boot", RunID: "other",
		Epoch: 3, Removed: at,
	}
	state := StateEntry{
		ID: 7, State: StateReady, Epoch: 2, Checked: at, Deep: at, Reason: "why", Depth: DepthContent, Tree: "sha256:tree", Contents: "sha256:03",
	}
	text := func(v any) string {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	for _, e := range []CommitEntry{commit, {}, {ID: 1, Name: "name", Time: at}} {
		if got, taken := plainCommit(text(e)); !taken || got != e {
			t.Errorf("taken %t: %+v, want %+v", taken, got, e)
		}
	}
	for _, e := range []StateEntry{state, {}, {ID: 1, State: StateReady, Tree: "sha256:another"}} {
		if got, taken := plainState(text(e)); !taken || !reflect.DeepEqual(got, e) {
			t.Errorf("taken %t: %+v, want %+v", taken, got, e)
		}
	}
	// All else is decoded by encoding/json.
	healed := commit
	state.Findings, state.Healing = []finding.Finding{{Path: "a", What: "missing"}}, &healed
	if _, taken := plainState(text(state)); taken {
		t.Error("findings were taken")
	}
	commit.Name, commit.Bytes = "ü <\"\n", -1
	if _, taken := plainCommit(text(commit)); taken {
		t.Error("escapes were taken")
	}
	record, err := layout.Encode(commit)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := decodePlain(record, func(p *plain, e *CommitEntry) { p.commit(e, &plainBefore) }); err != nil || *got != commit {
		t.Errorf("%+v, %v, want %+v", got, err, commit)
	}
	record[len(record)-2] ^= 1
	if _, err := decodePlain(record, func(p *plain, e *CommitEntry) { p.commit(e, &plainBefore) }); !errors.Is(err, layout.ErrCorrupt) {
		t.Errorf("a flipped bit: %v", err)
	}
}

// FuzzPlain: what is taken is what encoding/json makes of it.
func FuzzPlain(f *testing.F) {
	for _, seed := range []string{
		`{"sequence":1,"id":2,"name":"k8s.io/1/sha256:00","namespace":"k8s.io","parent":"sha256:00","entries":1,"bytes":0,"digest":"a","time":"2026-01-02T03:04:05Z","strategy":"syncfs","boot_id":"boot","run_id":"run","epoch":1}`,
		`{"id":1,"state":"ready","epoch":1,"checked":"2026-01-02T03:04:05.6+01:00","tree":"sha256:tree","contents":"b"}`,
		`{}`, `}`, `{"id":01}`, `{"id":18446744073709551616}`, `{"sequence":1,"entries":9223372036854775808}`, `{"id":1,}`, `{"id":-0}`, `{"id":1.0}`,
		`{"sequence":1,"id":1,"time":"2026-01-02t03:04:05Z"}`, `{"id":1,"checked":"2026-01-02T03:04:05,6Z"}`, `{"id":1,"state":""}`, `{"id":1,"deep":null}`,
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, payload string) {
		if got, taken := plainCommit(payload); taken {
			var want CommitEntry
			if err := json.Unmarshal([]byte(payload), &want); err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("%q: %+v, want %+v, %v", payload, got, want, err)
			}
		}
		if got, taken := plainState(payload); taken {
			var want StateEntry
			if err := json.Unmarshal([]byte(payload), &want); err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("%q: %+v, want %+v, %v", payload, got, want, err)
			}
		}
	})
}

// TestRows: EachRow and IDs return what containerd's functions return, and EachRow refuses a row that
// they refuse.
func TestRows(t *testing.T) {
	root := t.TempDir()
	db := open(t, root)
	for i := range 5 {
		commitOne(t, db, fmt.Sprint("layer-", i), "")
	}
	commitOne(t, db, "child", "layer-3")
	if err := db.Update(t.Context(), func(ctx context.Context, j *Journal) error {
		_, err := cstorage.CreateSnapshot(ctx, snapshots.KindView, "view", "child")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	compare := func() {
		t.Helper()
		if err := db.View(t.Context(), func(ctx context.Context, j *Journal) error {
			var want, got []BareRow
			err := Walk(ctx, func(id uint64, info snapshots.Info, _ snapshots.Usage) error {
				want = append(want, BareRow{id, info.Kind, info.Name, info.Parent})
				return nil
			})
			if err := errors.Join(err, j.EachRow(func(r BareRow) error { got = append(got, r); return nil })); err != nil {
				return err
			}
			if len(want) != 7 || !reflect.DeepEqual(got, want) {
				t.Errorf("%+v, want %+v", got, want)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	compare() // with nothing decoded before
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	db = open(t, root)
	compare()
	if err := db.Update(t.Context(), func(_ context.Context, j *Journal) error {
		row := j.top.Tx().Bucket([]byte("v1")).Bucket([]byte("snapshots")).Bucket([]byte("child"))
		if err := row.Put([]byte("createdat"), []byte("no time")); err != nil {
			return err
		}
		if err := j.EachRow(func(BareRow) error { return nil }); err == nil || !strings.Contains(err.Error(), "Time") {
			t.Errorf("a row without a time: %v", err)
		}
		return errNever
	}); !errors.Is(err, errNever) {
		t.Fatal(err)
	}
}

// TestRelease: what a walk has read is resident no more, and read again by the next.
func TestRelease(t *testing.T) {
	root := t.TempDir()
	labels := map[string]string{"long": strings.Repeat("x", 2000)} // a page for each row
	var rows []Row
	for i := range 2000 {
		name := fmt.Sprint("layer-", i)
		rows = append(rows, Row{ID: uint64(i + 1), Info: snapshots.Info{Kind: snapshots.KindCommitted, Name: name, Labels: labels}, Commit: CommitEntry{ID: uint64(i + 1), Name: name}})
	}
	if _, err := Rebuild(t.Context(), root, "test", rows); err != nil {
		t.Fatal(err)
	}
	db := open(t, root)
	walk := func() {
		n := 0
		if err := db.View(t.Context(), func(ctx context.Context, _ *Journal) error {
			return Walk(ctx, func(uint64, snapshots.Info, snapshots.Usage) error { n++; return nil })
		}); err != nil || n != len(rows) {
			t.Errorf("%d rows, %v", n, err)
		}
	}
	walk()
	before := residentKiB(t, db.Path())
	if before < 4*len(rows) {
		t.Fatalf("%d KiB are resident after a walk", before)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		walk()
	}()
	for range 100 {
		if err := db.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	<-ended
	if err := db.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	if after := residentKiB(t, db.Path()); after > before/10 {
		t.Errorf("%d KiB are resident, %d before", after, before)
	}
	walk()
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if err := db.Release(t.Context()); !errors.Is(err, os.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

// residentKiB is how much of a file this process has in its memory maps (proc_pid_smaps(5)).
func residentKiB(t *testing.T, path string) (sum int) {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	inside := false
	for line := range strings.Lines(string(maps)) {
		fields := strings.Fields(line)
		if !strings.HasSuffix(fields[0], ":") {
			inside = fields[len(fields)-1] == path
		} else if n := 0; inside && fields[0] == "Rss:" {
			if n, err = strconv.Atoi(fields[1]); err != nil {
				t.Fatal(err)
			}
			sum += n
		}
	}
	return sum
}
