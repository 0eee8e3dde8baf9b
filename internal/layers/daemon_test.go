package layers_test

import (
	"context"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layers"
	"github.com/durable-snapshotter/durable-snapshotter/internal/rebuild"
	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
)

// The tests of package layers run a whole snapshotter, which imports the package:
// they start it through these functions.
func init() {
	config := func(c layers.DaemonConfig) snapshotter.Config {
		return snapshotter.Config{
			Root: c.Root, JournalHistory: 10, ContentRoot: c.ContentRoot, BootID: c.BootID, MountOptions: c.MountOptions,
			NoBackground: c.NoBackground, OnDamaged: c.OnDamaged, OnReady: c.OnReady, OnBrake: c.OnBrake,
			Archives: c.Archives, OnOutside: c.OnOutside,
		}
	}
	layers.StartDaemon = func(ctx context.Context, c layers.DaemonConfig) (layers.Daemon, *layers.Layers, error) {
		s, err := snapshotter.New(ctx, config(c))
		if err != nil {
			return nil, nil, err
		}
		return s, s.Layers(), nil
	}
	layers.RepairRoot = func(ctx context.Context, c layers.DaemonConfig, o layers.RepairOptions) ([]layers.RepairResult, error) {
		return snapshotter.RepairRoot(ctx, config(c), o)
	}
	layers.Rebuild = func(ctx context.Context, root string) (committed int, err error) {
		r, err := rebuild.Database(ctx, root)
		return r.Committed, err
	}
}
