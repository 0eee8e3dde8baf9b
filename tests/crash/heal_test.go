package crash

import (
	"maps"
	"slices"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
)

// TestHeal cuts the power while damaged layers are verified and healed, and
// others are unpacked and removed. Whatever has a blob must be whole as soon as
// a client calls, nothing may be answered for before it is, and what has no blob
// must be refused, by name, in the way of nothing else.
func TestHeal(t *testing.T) {
	b := theBench(t)
	for _, c := range []struct {
		fs     disk.FS
		name   string
		harm   workload.Harm
		states int
	}{
		{disk.Ext4, "heal", workload.Wounds, 20}, {disk.XFS, "heal", workload.Wounds, 10}, {disk.Btrfs, "heal", workload.Wounds, 10},
		{disk.Ext4, "heal-corrupt", workload.Corruption, 10}, {disk.Ext4, "heal-everything", workload.Everything, 10},
	} {
		name := c.name
		t.Run(string(c.fs)+"/"+name, func(t *testing.T) {
			r, err := lab.Record(t.Context(), lab.Setup{
				FS: c.fs, Seed: seed, Name: name, Heal: &lab.Heal{Harm: c.harm},
				Daemon: b.Daemon(b.Ours, name+"-"+string(c.fs)),
			})
			if err != nil {
				t.Fatal(err)
			}
			if len(r.Record.Damaged) < 6 || len(r.Record.Hopeless) == 0 {
				t.Fatalf("damaged are only %v", r.Record.Damaged)
			}
			cases := state.Enumerate(r.Log, state.Options{From: r.Start, Seed: seed, Want: c.states})
			t.Logf("%d cases; damaged: %v; removed in the middle of a healing: %t", len(cases), slices.Sorted(maps.Values(r.Record.Damaged)), r.Record.Midway)
			check := lab.Check{
				Recording: r, Cases: lab.Some(cases, c.states),
				Subject: inProcess, Sample: daemons(b, "boot-"+name+"-"+string(c.fs)), Every: 25,
				Deep: 25, Nested: 10, Inner: 10, Strict: true,
			}
			tally, err := check.Run(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			logTally(t, tally)
			if tally.Lost != 0 || tally.Lies != 0 || tally.Flawed != 0 {
				t.Errorf("%d lost, %d lies, %d flawed", tally.Lost, tally.Lies, tally.Flawed)
			}
			if tally.Nested == 0 {
				t.Error("no healing was cut again")
			}
			if tally.Healing == 0 {
				t.Error("no cut has met a healing")
			}
			if unmeasured(tally) {
				t.Errorf("%d of %d states were not measured", tally.NotMeasured, tally.States)
			}
		})
	}
}

// TestHealOnFailingDisk fails one write after another while damaged layers heal.
// Nothing may be answered for that did not arrive, and the next boot heals it:
// the daemon had stopped in order, so whatever it took for healed is not verified
// again.
func TestHealOnFailingDisk(t *testing.T) {
	b := theBench(t)
	for fs, step := range map[disk.FS]int{disk.Ext4: 90, disk.XFS: 150, disk.Btrfs: 150} {
		t.Run(string(fs), func(t *testing.T) {
			all, struck := &lab.Tally{}, 0
			for skip := 0; ; skip += step {
				tally, hits, err := b.HealFailing(t.Context(), b.Daemon(b.Ours, "heal-failing-"+string(fs)), fs, seed, skip)
				if err != nil {
					t.Fatal(err)
				}
				all.Add(tally)
				if hits == 0 {
					break
				}
				struck += hits
			}
			logTally(t, all)
			t.Logf("%d writes have failed", struck)
			if struck == 0 {
				t.Error("no write has failed")
			}
			if all.Lost != 0 || all.Lies != 0 || all.Flawed != 0 {
				t.Errorf("%d lost, %d lies, %d flawed", all.Lost, all.Lies, all.Flawed)
			}
		})
	}
}
