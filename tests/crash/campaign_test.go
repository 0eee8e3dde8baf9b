package crash

import (
	"context"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/campaign"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/report"
)

// TestCampaign interrupts a campaign on a foreign snapshotter, and goes
// on with it. The built-in overlayfs is the foreign one: once configured where to keep
// its data, once insisting on a directory and a socket of its own.
func TestCampaign(t *testing.T) {
	t.Parallel()
	b := theBench(t)
	here := t.TempDir()
	const states = 12
	for _, f := range []struct {
		name    string
		foreign campaign.Foreign
	}{
		{"configured", campaign.Foreign{Start: b.Stock + " --root {root} --address {address}"}},
		{"insisting", campaign.Foreign{
			Start:   b.Stock + " --root " + here + " --address " + filepath.Join(b.Dir, "own.sock"),
			Address: filepath.Join(b.Dir, "own.sock"), Roots: []string{here},
		}},
	} {
		t.Run(f.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "campaign")
			o := campaign.Options{Workload: campaign.API, Seed: seed, FS: []disk.FS{disk.Ext4}, Foreign: &f.foreign, States: states}

			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			sum, err := campaign.Run(ctx, dir, o, false, &interrupter{stop: stop})
			if !errors.Is(err, campaign.ErrInterrupted) {
				t.Fatalf("interrupted: %v", err)
			}
			first := sum.States
			if first == 0 || first >= o.States || sum.Done {
				t.Fatalf("interrupted after %d of %d states", first, o.States)
			}
			if _, err := campaign.Run(t.Context(), dir, o, false, io.Discard); !errors.Is(err, campaign.ErrOther) {
				t.Errorf("begun once more in the same directory: %v, want %v", err, campaign.ErrOther)
			}
			other := o
			other.Seed++
			if _, err := campaign.Run(t.Context(), dir, other, true, io.Discard); !errors.Is(err, campaign.ErrOther) {
				t.Errorf("resumed with another seed: %v, want %v", err, campaign.ErrOther)
			}

			sum, err = campaign.Run(t.Context(), dir, o, true, io.Discard)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%d states, then: %s", first, sum.Line())
			if !sum.Done || sum.States <= first || sum.Lost == 0 || sum.Good() {
				t.Errorf("of a snapshotter that loses layers: %s", sum.Line())
			}
			store, err := campaign.Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			seen := map[string]bool{}
			for _, l := range store.Lines {
				if seen[l.ID] {
					t.Errorf("%s was examined twice", l.ID)
				}
				seen[l.ID] = true
			}
			wellFormed(t, store)
			again(t, dir, sum.Bad[0])
		})
	}
}

// interrupter stops a campaign when it reports its first state.
type interrupter struct{ stop context.CancelFunc }

func (i *interrupter) Write(p []byte) (int, error) {
	if strings.Contains(string(p), "foreign-") {
		i.stop()
	}
	return len(p), nil
}

// wellFormed reads the report as XML.
func wellFormed(t *testing.T, store *campaign.Store) {
	t.Helper()
	page, err := report.HTML(store)
	if err != nil {
		t.Fatal(err)
	}
	in := xml.NewDecoder(strings.NewReader(string(page)))
	drawings := 0
	for {
		token, err := in.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			if werr := os.WriteFile(filepath.Join(os.TempDir(), "report.html"), page, 0o600); werr != nil {
				t.Error(werr)
			}
			t.Fatalf("report: %v", err)
		}
		if start, ok := token.(xml.StartElement); ok && start.Name.Local == "svg" {
			drawings++
		}
	}
	if drawings == 0 || !strings.Contains(string(page), store.Summary().Bad[0].ID) {
		t.Errorf("the report has %d drawings, and the first bad state is in it: %v", drawings, strings.Contains(string(page), store.Summary().Bad[0].ID))
	}
}

// again replays a state and finds the same.
func again(t *testing.T, dir string, line campaign.Line) {
	t.Helper()
	held := false
	r, err := campaign.Replay(t.Context(), dir, line.ID, func(_ lab.Result, mountpoint string) error {
		held = true
		_, err := os.ReadDir(mountpoint)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if r.Verdict.String() != line.Verdict || !held {
		t.Errorf("%s was %s, and is %s; mounted: %v", line.ID, line.Verdict, r.Verdict, held)
	}
}

// TestOptions: what cannot be done is reported at once.
func TestOptions(t *testing.T) {
	good := campaign.Options{Workload: campaign.API, Seed: 1, FS: []disk.FS{disk.Ext4}, States: 1}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*campaign.Options){
		"workload":                func(o *campaign.Options) { o.Workload = "half" },
		"no states":               func(o *campaign.Options) { o.States = 0 },
		"no file system":          func(o *campaign.Options) { o.FS = nil },
		"unknown file system":     func(o *campaign.Options) { o.FS = []disk.FS{"vfat"} },
		"a file system twice":     func(o *campaign.Options) { o.FS = []disk.FS{disk.XFS, disk.XFS} },
		"no command":              func(o *campaign.Options) { o.Foreign = &campaign.Foreign{Address: "/s", Roots: []string{"/r"}} },
		"neither movable nor not": func(o *campaign.Options) { o.Foreign = &campaign.Foreign{Start: "x"} },
		"both": func(o *campaign.Options) {
			o.Foreign = &campaign.Foreign{Start: "x {root} {address}", Address: "/s", Roots: []string{"/r"}}
		},
		"relative root": func(o *campaign.Options) {
			o.Foreign = &campaign.Foreign{Start: "x", Address: "/s", Roots: []string{"r"}}
		},
		"a foreign node": func(o *campaign.Options) {
			o.Workload, o.Foreign = campaign.Full, &campaign.Foreign{Start: "x {root} {address}"}
		},
	} {
		o := good
		spoil(&o)
		if err := o.Validate(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
