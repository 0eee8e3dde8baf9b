package snapshotter

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/moby/sys/userns"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/overlayutil"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Mounts returns the mounts of an active snapshot or a view, when its parents
// are whole; see Stat. What Apply has made is in them from then on.
func (s *Snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	if err := layout.CheckName("key", key); err != nil {
		return nil, err
	}
	mounts, id, info, err := s.mountsOf(ctx, key)
	if err != nil {
		return nil, err
	}
	if err := s.usable(id, info); err != nil {
		return nil, fmt.Errorf("mounts %q: %w", key, err)
	}
	if info.Parent != "" && !s.layers.Lately(info.Parent) {
		if err := s.layers.Wait(ctx, info.Parent, false); err != nil {
			return nil, fmt.Errorf("mounts %q: %w", key, err)
		}
	}
	if err := s.show(ctx, key); err != nil {
		return nil, fmt.Errorf("mounts %q: %w", key, err)
	}
	return mounts, nil
}

// mountsOf returns the mounts of a snapshot and its row.
func (s *Snapshotter) mountsOf(ctx context.Context, key string) (mounts []mount.Mount, id uint64, info snapshots.Info, err error) {
	if mounts, err = s.overlay.Mounts(ctx, key); err != nil {
		return nil, 0, info, err
	}
	if err := s.gate.View(ctx, func(ctx context.Context, _ *storage.Journal) (err error) {
		id, info, _, err = storage.Info(ctx, key)
		return err
	}); err != nil {
		return nil, 0, info, fmt.Errorf("mounts %q: %w", key, err)
	}
	return s.adapt(mounts, id, info), id, info, nil
}

// show places what Apply has made where the mounts of its snapshot have it. What is
// written through them is not known any more, so Commit reads and syncs everything.
func (s *Snapshotter) show(ctx context.Context, key string) error {
	a := s.actives.Get(key)
	if a == nil {
		return nil
	}
	if made, beside, err := s.actives.Made(a); made == nil || !beside || err != nil {
		return nil // nothing was applied, or that has not ended
	}
	unlock, err := s.keys.Lock(ctx, key)
	if err != nil {
		return err
	}
	defer unlock()
	if _, beside, err := s.actives.Made(a); !beside || err != nil || s.actives.Get(key) != a {
		return err
	}
	return s.place(a)
}

// adapt changes containerd's mounts of a snapshot where they would break a
// promise.
func (s *Snapshotter) adapt(mounts []mount.Mount, id uint64, info snapshots.Info) []mount.Mount {
	if info.Kind != snapshots.KindActive || len(mounts) != 1 {
		return mounts
	}
	m := mounts[0]
	if m.Type == "bind" && isRebase(info) {
		// The applier turns whiteouts into overlay's only when it sees an
		// overlay mount (core/diff/apply/apply_linux.go:34). The empty lower
		// directory makes it one that can be mounted, too.
		m = mount.Mount{Type: "overlay", Source: "overlay", Options: overlayutil.Options{
			Work:  filepath.Join(s.root.Dir(id), "work"),
			Upper: s.root.Tree(id),
			Lower: []string{s.root.Empty()},
			Rest:  append(mappings(m.Options), s.options...),
		}.Strings()}
	}
	if m.Type == "overlay" {
		m.Options = append(slices.Clone(m.Options), s.selfContained...)
	}
	if _, extraction := layout.ExtractionOf(info.Name, info.Labels); extraction && m.Type == "overlay" && !userns.RunningInUserNS() {
		// The applier takes the parents from lowerdir, to copy attributes of
		// directories from them, and does not see what hides what there
		// (pkg/archive/tar.go:482): directories come back with attributes they
		// had before they were removed, or a pull fails where one was. Commit
		// gives directories their attributes, so it shall not find any.
		o := overlayutil.ParseOptions(m.Options)
		o.Quoted = o.FitsQuoted(s.root.Snapshots())
		m.Options = o.Strings()
	}
	return []mount.Mount{m}
}

// mappings keeps the options that map owners.
func mappings(options []string) []string {
	return slices.DeleteFunc(slices.Clone(options), func(o string) bool {
		return !strings.HasPrefix(o, "uidmap=") && !strings.HasPrefix(o, "gidmap=")
	})
}

// overlayMountOptions completes the configured options in the way of
// containerd's snapshotter, which then finds nothing to add: ours and its
// mounts must agree.
func overlayMountOptions(root string, configured []string) (all, selfContained []string, f overlayutil.Features, err error) {
	all = slices.Clone(configured)
	if overlayutil.SpaceOf(all) == overlayutil.Trusted && overlayutil.NeedsUserXattr(root) {
		all = append(all, "userxattr")
	}
	space := overlayutil.SpaceOf(all)
	if f, err = overlayutil.Probe(root, space); err != nil {
		return nil, nil, f, err
	}
	given := func(option string) bool {
		key, _, _ := strings.Cut(option, "=")
		return slices.ContainsFunc(configured, func(o string) bool { return o == key || strings.HasPrefix(o, key+"=") })
	}
	if f.Index && !given("index") {
		all = append(all, "index=off")
	}
	selfContained = slices.DeleteFunc(f.SelfContained(space), given)
	return all, selfContained, f, nil
}
