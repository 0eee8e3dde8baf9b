// Package orphans finds snapshots that containerd knows nothing of: their images were
// removed while the snapshotter was not part of containerd's configuration.
package orphans

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
)

// Orphans are rows that containerd knows nothing of.
type Orphans struct {
	Rows    []repull.Snapshot
	Foreign []repull.Snapshot // rows of another client than containerd, which knows nothing about them
}

// Find determines for each of rows, under each of the names that [repull.Containerd.Served]
// has returned, whether containerd has it on record. When that fails for one of them, there
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
func Find(ctx context.Context, c repull.View, names []string, rows []repull.Snapshot) (o Orphans, err error) {
	// Proves that containerd itself answers, before and after.
	if _, err := c.Namespaces(ctx); err != nil {
		return o, err
	}
	type place struct{ namespace, key string }
	groups := map[place][]repull.Snapshot{}
	for _, r := range rows {
		ns, key, ok := r.Place()
		if !ok {
			o.Foreign = append(o.Foreign, r)
			continue
		}
		groups[place{ns, key}] = append(groups[place{ns, key}], r)
	}
	for p, group := range groups {
		left := group
		for _, name := range names {
			ctx := namespaces.WithNamespace(ctx, p.namespace)
			if left, err = unknown(ctx, c.Snapshotter(name), p.key, left); err != nil {
				return o, fmt.Errorf("stat snapshot %s in namespace %s: %w", p.key, p.namespace, err)
			}
		}
		o.Rows = append(o.Rows, left...)
	}
	slices.SortFunc(o.Rows, func(a, b repull.Snapshot) int { return cmp.Compare(a.ID, b.ID) })
	_, err = c.Namespaces(ctx)
	return o, err
}

// unknown returns those of the rows with one key that containerd does not mean by it.
func unknown(ctx context.Context, sn snapshots.Snapshotter, key string, rows []repull.Snapshot) ([]repull.Snapshot, error) {
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
	means := func(r repull.Snapshot) bool { return r.Sealed != "" && r.Sealed == info.Labels[repull.SealedLabel] }
	if info.Labels[repull.SealedLabel] == "" {
		mounts, err := sn.Mounts(ctx, key)
		if err != nil {
			return nil, nil
		}
		text := ""
		for _, m := range mounts {
			text += m.Source + "\n" + strings.Join(m.Options, "\n") + "\n"
		}
		// upperdir, or the source of a bind mount; lower directories belong to others.
		means = func(r repull.Snapshot) bool {
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
