package repull

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
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

// place takes the name of a row apart; ok is false when it is not containerd's.
func (s Snapshot) place() (namespace, key string, ok bool) {
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
	r, err := c.inspect.Plugins(ctx, &introspectionapi.PluginsRequest{Filters: []string{"type==" + snapshotPlugin}})
	if err != nil {
		return nil, fmt.Errorf("list the plugins of containerd: %w", errgrpc.ToNative(err))
	}
	for _, p := range r.Plugins {
		address := strings.TrimPrefix(p.Exports["address"], "unix://")
		if address == "" || address != socket && !sameFile(address, socket) {
			continue
		}
		if p.InitErr != nil {
			return nil, fmt.Errorf("%w: its proxy plugin %s did not start: %s", ErrNotServed, p.ID, p.InitErr.Message)
		}
		names = append(names, p.ID)
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("%w: no entry of proxy_plugins in its configuration has the address %s", ErrNotServed, socket)
	}
	return names, nil
}

// snapshotPlugin is the type of containerd's snapshotters among its plugins.
const snapshotPlugin = "io.containerd.snapshotter.v1"

// Orphans are rows that containerd knows nothing of.
type Orphans struct {
	Rows    []Snapshot
	Foreign []Snapshot // rows of another client than containerd, which knows nothing about them
}

// Orphans determines for each of rows, under each of the names that [Served] has
// returned, whether containerd has it on record. When that fails for one of them, there
// is an error.
//
// containerd answers NotFound for a key that it does not have on record, and calls the
// snapshotter for any other (core/metadata/snapshot.go, Stat). The
// snapshotter has each of rows, so it never answers that for them, but perhaps that they are
// damaged: any answer but "not found" means that containerd knows the key. One of
// several rows with the same key and different numbers is known, at most: that whose
// time of commit, or whose directory in mounts, containerd passes on.
//
// An operation in flight has a row before containerd has it on record. Call twice,
// some time apart, and take what is an orphan both times.
func (c *Containerd) Orphans(ctx context.Context, names []string, rows []Snapshot) (o Orphans, err error) {
	// Proves that containerd itself answers, before and after.
	if _, err := c.listNamespaces(ctx); err != nil {
		return o, err
	}
	type place struct{ namespace, key string }
	groups := map[place][]Snapshot{}
	for _, r := range rows {
		ns, key, ok := r.place()
		if !ok {
			o.Foreign = append(o.Foreign, r)
			continue
		}
		groups[place{ns, key}] = append(groups[place{ns, key}], r)
	}
	for p, group := range groups {
		unknown := group
		for _, name := range names {
			ctx := namespaces.WithNamespace(ctx, p.namespace)
			if unknown, err = c.unknown(ctx, name, p.key, unknown); err != nil {
				return o, fmt.Errorf("stat snapshot %s in namespace %s: %w", p.key, p.namespace, err)
			}
		}
		o.Rows = append(o.Rows, unknown...)
	}
	slices.SortFunc(o.Rows, func(a, b Snapshot) int { return cmp.Compare(a.ID, b.ID) })
	_, err = c.listNamespaces(ctx)
	return o, err
}

// unknown returns those of the rows with one key that containerd does not mean by it.
func (c *Containerd) unknown(ctx context.Context, snapshotter, key string, rows []Snapshot) ([]Snapshot, error) {
	sn := c.snapshotter(Layer{Snapshotter: snapshotter})
	info, err := sn.Stat(ctx, key)
	switch {
	case errdefs.IsNotFound(err):
		return rows, nil
	case ctx.Err() != nil:
		return nil, err
	case len(rows) < 2:
		return nil, nil
	case err != nil:
		return nil, nil // one of them, and nothing shows which
	}
	means := func(r Snapshot) bool { return r.Sealed != "" && r.Sealed == info.Labels[SealedLabel] }
	if info.Labels[SealedLabel] == "" {
		mounts, err := sn.Mounts(ctx, key)
		if err != nil {
			return nil, nil
		}
		text := ""
		for _, m := range mounts {
			text += m.Source + "\n" + strings.Join(m.Options, "\n") + "\n"
		}
		// upperdir, or the source of a bind mount; lower directories belong to others.
		means = func(r Snapshot) bool {
			for _, line := range strings.Split(text, "\n") {
				if !strings.HasPrefix(line, "lowerdir") && strings.HasSuffix(line, fmt.Sprintf("/snapshots/%d/fs", r.ID)) {
					return true
				}
			}
			return false
		}
	}
	i := slices.IndexFunc(rows, means)
	if i < 0 {
		return nil, nil
	}
	return slices.Delete(slices.Clone(rows), i, i+1), nil
}

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
	r, err := c.inspect.Plugins(ctx, &introspectionapi.PluginsRequest{Filters: []string{"type==" + snapshotPlugin}})
	if err != nil {
		return "", fmt.Errorf("list the plugins of containerd: %w", errgrpc.ToNative(err))
	}
	if !slices.ContainsFunc(r.Plugins, func(p *introspectionapi.Plugin) bool { return p.ID == snapshotter && p.InitErr == nil }) {
		return fmt.Sprintf("containerd has no snapshotter %s", snapshotter), nil
	}
	foreign := ""
	err = rows.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if _, _, ok := (Snapshot{Name: info.Name}).place(); !ok {
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
