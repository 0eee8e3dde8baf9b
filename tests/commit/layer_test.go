package commit

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// layerSize is the size of the largest file that writeLayer makes: more than a
// page, and not a multiple of one.
const layerSize = 70_001

// writeLayer fills a directory with one entry of each kind that a layer can
// hold. Layers of different numbers differ, those of one number are the same,
// times included.
func writeLayer(dir string, n int) error {
	at := func(name string) string { return filepath.Join(dir, name) }
	noise := bytes.Repeat(fmt.Appendf(nil, "layer %d ", n), layerSize)[:layerSize]
	steps := []func() error{
		func() error { return os.Mkdir(at("dir"), 0o750) },
		func() error { return os.MkdirAll(at(fmt.Sprintf("dir/deep/%d", n)), 0o755) },
		func() error { return os.WriteFile(at("dir/file"), noise, 0o644) },
		func() error { return os.WriteFile(at(fmt.Sprintf("file-%d", n)), noise[:4097], 0o600) },
		func() error { return os.WriteFile(at("empty"), nil, 0o644) },
		func() error { return os.Link(at("dir/file"), at("dir/again")) },
		func() error { return os.Symlink("dir/file", at("symlink")) },
		func() error { return unix.Mknod(at("whiteout"), unix.S_IFCHR, int(unix.Mkdev(0, 0))) },
		func() error { return unix.Lsetxattr(at("dir"), "trusted.overlay.opaque", []byte("y"), 0) },
		func() error { return unix.Lsetxattr(at("dir/file"), "user.layer", fmt.Append(nil, n), 0) },
		func() error { return os.Lchown(at("empty"), 1000+n, 1000) },
		func() error { return os.Chmod(at("empty"), 0o755|fs.ModeSetuid) },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("write layer %d: %w", n, err)
		}
	}
	return setTimes(dir, time.Unix(1_700_000_000+int64(n), 123_456_789))
}

// setTimes gives everything below dir, and dir itself, one modification time.
// Children before parents, whose times they would change.
func setTimes(dir string, to time.Time) error {
	var names []string
	err := filepath.WalkDir(dir, func(name string, _ fs.DirEntry, err error) error {
		names = append(names, name)
		return err
	})
	if err != nil {
		return err
	}
	spec := []unix.Timespec{unix.NsecToTimespec(to.UnixNano()), unix.NsecToTimespec(to.UnixNano())}
	for _, name := range slices.Backward(names) {
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, name, spec, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return &os.PathError{Op: "utimensat", Path: name, Err: err}
		}
	}
	return nil
}

// reference returns the fingerprints of the layers 0 … n-1, made on a healthy
// file system.
func reference(t *testing.T, n int) []kit.Tree {
	t.Helper()
	var trees []kit.Tree
	for i := range n {
		dir := t.TempDir()
		check(t, os.Chmod(dir, 0o755))
		check(t, writeLayer(dir, i))
		trees = append(trees, must[kit.Tree](t)(kit.Fingerprint(dir)))
	}
	return trees
}

// sameTree compares a layer on disk with its reference.
func sameTree(t *testing.T, what, dir string, want kit.Tree) {
	t.Helper()
	if err := compare(dir, want); err != nil {
		t.Errorf("%s is not whole: %v", what, err)
	}
}

func compare(dir string, want kit.Tree) error {
	got, err := kit.Fingerprint(dir)
	if err != nil {
		return err
	}
	if d := kit.Diff(want, got, 8); d != "" {
		return errors.New(d)
	}
	return nil
}

// link is one layer of a chain that is being unpacked, with the names that
// containerd would give it.
type link struct {
	number     int
	key, name  string
	parentName string
	chainID    string
}

// chain names n layers on top of each other. unique makes the keys different
// from those of an earlier try; the names stay.
func chain(n int, unique string) []link {
	var links []link
	parent := ""
	for i := range n {
		chainID := fmt.Sprintf("sha256:%x", sha256.Sum256(fmt.Append(nil, i)))
		l := link{
			number: i, parentName: parent, chainID: chainID,
			key:  fmt.Sprintf("default/%d/extract-%s%d %s", 100+2*i, unique, i, chainID),
			name: fmt.Sprintf("default/%d/%s", 101+2*i, chainID),
		}
		links = append(links, l)
		parent = l.name
	}
	return links
}

func (l link) labels() snapshots.Opt {
	return snapshots.WithLabels(map[string]string{"containerd.io/snapshot.ref": l.chainID})
}

// prepare makes the active snapshot and returns the directory to write to.
func (l link) prepare(ctx context.Context, sn snapshots.Snapshotter) (dir string, err error) {
	mounts, err := sn.Prepare(ctx, l.key, l.parentName, l.labels())
	if err != nil {
		return "", err
	}
	return upperOf(mounts)
}

func (l link) commit(ctx context.Context, sn snapshots.Snapshotter) error {
	return sn.Commit(ctx, l.name, l.key, l.labels())
}

// unpack is the whole life of one layer.
func (l link) unpack(ctx context.Context, sn snapshots.Snapshotter) error {
	dir, err := l.prepare(ctx, sn)
	if err == nil {
		err = writeLayer(dir, l.number)
	}
	if err == nil {
		err = l.commit(ctx, sn)
	}
	return err
}
