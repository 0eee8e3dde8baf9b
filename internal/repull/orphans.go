package repull

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
)

// ErrNotServed is returned when containerd has no snapshotter at a socket: what it
// reports about snapshots then means nothing.
var ErrNotServed = errors.New("containerd does not know this snapshotter; nothing can be concluded")

// Snapshot is a row of the snapshotter.
type Snapshot struct {
	ID   uint64 // of its directory, snapshots/<ID>
	Name string // <namespace>/<number>/<key>
	// Sealed is the value of SealedLabel that Stat answers for it; "" when it is
	// not committed.
	Sealed string
}

// SealedLabel is a label that the snapshotter adds to Stat's answer. Through
// containerd, which passes it on, it shows which of two rows containerd means.
const SealedLabel = "durable-snapshotter/sealed"

// Place takes the name of a row apart; ok is false when it is not containerd's.
func (s Snapshot) Place() (namespace, key string, ok bool) {
	part := strings.SplitN(s.Name, "/", 3)
	if len(part) < 3 {
		return "", "", false
	}
	_, err := strconv.ParseUint(part[1], 10, 64)
	return part[0], part[2], err == nil
}

// Served returns the names under which containerd serves the snapshotter at a unix
// socket. The error wraps ErrNotServed when there is none.
func (c *Containerd) Served(ctx context.Context, socket string) (names []string, err error) {
	all, err := c.Plugins(ctx, snapshotPlugin)
	if err != nil {
		return nil, err
	}
	for _, p := range all {
		address := strings.TrimPrefix(p.Exports["address"], "unix://")
		if address == "" || address != socket && !sameFile(address, socket) {
			continue
		}
		if p.Failed != "" {
			return nil, fmt.Errorf("%w: its proxy plugin %s did not start: %s", ErrNotServed, p.ID, p.Failed)
		}
		names = append(names, p.ID)
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("%w: no entry of proxy_plugins in its configuration has the address %s", ErrNotServed, socket)
	}
	return names, nil
}

// Snapshotters lists the snapshotters that containerd has loaded.
func (c *Containerd) Snapshotters(ctx context.Context) (names []string, err error) {
	all, err := c.Plugins(ctx, snapshotPlugin)
	if err != nil {
		return nil, err
	}
	for _, p := range all {
		if p.Failed == "" {
			names = append(names, p.ID)
		}
	}
	return names, nil
}

// snapshotPlugin is the type of containerd's snapshotters among its plugins.
const snapshotPlugin = "io.containerd.snapshotter.v1"

// Collect has containerd delete what it does not know from its snapshotters, and waits
// for it. containerd does so under its own lock, which no Prepare or Commit in flight
// holds; it begins only when it has removed a snapshot, so a little one is made and
// removed.
func (c *Containerd) Collect(ctx context.Context, snapshotter string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	all, err := c.listNamespaces(ctx)
	if err != nil {
		return err
	}
	namespace := namespaces.Default
	if len(all) > 0 && !slices.Contains(all, namespace) {
		namespace = all[0]
	}
	return c.collectIn(ctx, namespace, snapshotter)
}

func (c *Containerd) collectIn(ctx context.Context, namespace, snapshotter string) error {
	return c.collectGarbage(namespaces.WithNamespace(ctx, namespace), Layer{Namespace: namespace, Snapshotter: snapshotter}, true)
}

// CollectMissed is Collect for what containerd could not delete while the snapshotter
// was down: containerd forgets that there is something to delete before it knows
// whether the snapshotter has deleted it (core/metadata/db.go, GarbageCollect and
// cleanupSnapshotter), and begins again only when something else is removed.
//
// It does nothing, and returns the reason, when containerd has no snapshotter of that
// name, or no namespace, because one would have to be made. The same when rows has one
// that another client has made: containerd would delete it, as any of its collections.
func (c *Containerd) CollectMissed(ctx context.Context, snapshotter string, rows Rows) (skipped string, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	loaded, err := c.Snapshotters(ctx)
	if err != nil {
		return "", err
	}
	if !slices.Contains(loaded, snapshotter) {
		return fmt.Sprintf("containerd has no snapshotter %s", snapshotter), nil
	}
	foreign := ""
	err = rows.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if _, _, ok := (Snapshot{Name: info.Name}).Place(); !ok {
			foreign = info.Name
		}
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("list snapshots: %w", err)
	}
	if foreign != "" {
		return fmt.Sprintf("snapshot %q is of another client than containerd", foreign), nil
	}
	all, err := c.listNamespaces(ctx)
	if err != nil {
		return "", err
	}
	if len(all) == 0 {
		return "containerd has no namespace", nil
	}
	return "", c.collectIn(ctx, all[0], snapshotter)
}

func sameFile(a, b string) bool {
	x, err := os.Stat(a)
	if err != nil {
		return false
	}
	y, err := os.Stat(b)
	return err == nil && os.SameFile(x, y)
}
