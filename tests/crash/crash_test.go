package crash

import (
	"os"
	"sync"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

func TestMain(m *testing.M) {
	disk.Init()
	os.Exit(kit.Main(m.Run))
}

var bench = sync.OnceValues(func() (*lab.Bench, error) { return lab.NewBench() })

func theBench(t *testing.T) *lab.Bench {
	t.Helper()
	b, err := bench()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestMutants(t *testing.T) {
	b := theBench(t)
	for _, m := range lab.Mutants() {
		t.Run(m.Name, func(t *testing.T) {
			c, err := b.Hunt(t.Context(), m, 1)
			if err != nil {
				t.Fatal(err)
			}
			t.Log(c)
			if !c.Caught {
				t.Error("not caught")
			}
		})
	}
}
