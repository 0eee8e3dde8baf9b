package crash

import (
	"os"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

func TestMain(m *testing.M) {
	disk.Init()
	os.Exit(kit.Main(m.Run))
}

func TestTry(t *testing.T) {
	ctx := t.Context()
	b, err := lab.NewBench(ctx)
	if err != nil {
		t.Fatal(err)
	}
	fs := disk.FS(os.Getenv("TRYFS"))
	daemon := b.Daemon(b.Ours, "record")
	stock := os.Getenv("STOCK") != ""
	if stock {
		daemon = b.StockDaemon("record")
	}
	r, err := lab.Record(ctx, lab.Setup{FS: fs, Seed: 1, Daemon: daemon, Name: "try"})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", r.Stats)
	cases := state.Enumerate(r.Log, state.Options{From: r.Start, Seed: 1, Want: 600})
	t.Logf("%d cases", len(cases))
	c := lab.Check{Recording: r, Cases: cases, Subject: func(int) oracle.Subject { return oracle.InProcess{} }, Deep: 20, Nested: 100, Workers: 4}
	if stock {
		c.Subject = func(w int) oracle.Subject { return b.StockDaemon("check"+string(rune(65+w))) }
	}
	tally, err := c.Run(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Log(tally.Counts)
	for _, bad := range tally.Worst(5) {
		t.Log(bad)
	}
}
