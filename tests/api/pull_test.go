package api

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// TestPull unpacks every standard image with the built-in overlayfs and with the
// daemon, by both ways a pull can take, and compares the trees entry by entry.
func TestPull(t *testing.T) {
	for _, way := range []string{"transfer", "local"} {
		t.Run(way, func(t *testing.T) {
			s := newStack(t, kit.NodeOptions{})
			for _, name := range []string{"all-kinds", "empty-layers", "runnable", "large"} {
				if name == "large" && way == "local" {
					continue // by the other way: it is the same extraction
				}
				t.Run(name, func(t *testing.T) {
					img := images.Get(t, name)
					checkImage(t, name, img)
					s.pull(t, way, "overlayfs", img)
					s.pull(t, way, "durable", img)
					want, got := s.tree(t, "overlayfs", img), s.tree(t, "durable", img)
					if d := kit.Diff(want, got, 10); d != "" {
						t.Errorf("the tree under durable is not that under overlayfs:\n%s", d)
					}
					checkTree(t, name, want)
					t.Logf("%s: %d layers, %d entries in the merged tree", name, len(img.Layers), len(got))
				})
			}
		})
	}
}

// checkImage makes sure that the images are as demanding as they are meant to be.
func checkImage(t *testing.T, name string, img kit.Pushed) {
	t.Helper()
	if name == "large" && (img.Inodes < 20_000 || img.Bytes < 400<<20) {
		t.Errorf("the large image has %d entries and %d MiB, want 20000 and 400", img.Inodes, img.Bytes>>20)
	}
	if name == "all-kinds" && len(img.Layers) < 5 {
		t.Errorf("the image of all kinds has %d layers, want at least 5", len(img.Layers))
	}
}

// checkTree verifies what makes the image of all kinds special, because two
// trees that both lack it would be equal too.
func checkTree(t *testing.T, name string, tree kit.Tree) {
	t.Helper()
	if name == "large" && len(tree) < 20_000 {
		t.Errorf("the merged tree of the large image has %d entries, want 20000", len(tree))
	}
	if name != "all-kinds" {
		return
	}
	for path, holds := range map[string]func(kit.Inode) bool{
		"bin/setuid":              func(n kit.Inode) bool { return n.Mode&fs.ModeSetuid != 0 },
		"bin/capable-owned":       func(n kit.Inode) bool { return n.Uid == 7 && strings.Contains(n.Xattrs, "security.capability") },
		"tmp":                     func(n kit.Inode) bool { return n.Mode&fs.ModeSticky != 0 },
		"links/a":                 func(n kit.Inode) bool { return n.Nlink >= 2 },
		"dev/big":                 func(n kit.Inode) bool { return unix.Major(n.Rdev) == 1000 && unix.Minor(n.Rdev) == 300000 },
		"dev/pipe":                func(n kit.Inode) bool { return n.Mode&fs.ModeNamedPipe != 0 },
		"xattr/user":              func(n kit.Inode) bool { return strings.Contains(n.Xattrs, `user.binary="\x01\xff\x02"`) },
		"swap/dir":                func(n kit.Inode) bool { return n.Mode.IsRegular() },
		"swap/file/inside":        func(n kit.Inode) bool { return n.Mode.IsRegular() },
		"parents/dir":             func(n kit.Inode) bool { return n.Uid == 1000 && n.Mode.Perm() == 0o750 },
		"parents/dir/inner":       func(n kit.Inode) bool { return n.Mode.IsRegular() },
		"names/new\nline":         func(n kit.Inode) bool { return n.Size == 7 },
		"gone/dir/fresh":          func(n kit.Inode) bool { return n.Mode.IsRegular() },
		"opaque/file":             func(n kit.Inode) bool { return n.Mode.IsRegular() },
		"names/not-utf8-\xff\xfe": func(n kit.Inode) bool { return n.Size == 5 },
	} {
		if n, ok := tree[path]; !ok || !holds(n) {
			t.Errorf("%q: %v (present: %t): the image is not what it should be", path, n, ok)
		}
	}
	for _, path := range []string{"gone/dir/inner", "gone/symlink", "opaque/symlink", "links/b", "home", "never-there"} {
		if n, ok := tree[path]; ok {
			t.Errorf("%q should have been removed by a layer: %v", path, n)
		}
	}
}

// TestRemoveLeavesNothing removes all images and expects containerd's garbage
// collection to have emptied the root of the daemon.
func TestRemoveLeavesNothing(t *testing.T) {
	s := newStack(t, kit.NodeOptions{})
	a, b := images.Get(t, "all-kinds"), images.Get(t, "runnable")
	s.pull(t, "transfer", "durable", a)
	s.pull(t, "local", "durable", b)
	if n := len(s.layerDirs(t)); n != len(a.Layers)+len(b.Layers) {
		t.Errorf("%d layer directories for %d layers", n, len(a.Layers)+len(b.Layers))
	}
	s.ctr(t, "image", "rm", "--sync", a.Ref)
	s.waitLayerDirs(t, len(b.Layers))
	s.ctr(t, "image", "rm", "--sync", b.Ref)
	s.ctr(t, "content", "prune", "references")
	s.waitLayerDirs(t, 0)
	if out := s.ctr(t, "snapshot", "--snapshotter", "durable", "ls"); strings.Count(out, "\n") != 1 {
		t.Errorf("snapshots after all images are gone:\n%s", out)
	}
	// What was removed can come back.
	s.pull(t, "transfer", "durable", a)
	s.tree(t, "durable", a)
}

// TestRestarts puts a restart of the daemon, orderly and by SIGKILL, and of
// containerd between a pull and the use of what was pulled.
func TestRestarts(t *testing.T) {
	s := newStack(t, kit.NodeOptions{})
	img := images.Get(t, "all-kinds")
	s.pull(t, "transfer", "durable", img)
	want := s.tree(t, "durable", img)
	listed := s.ctr(t, "snapshot", "--snapshotter", "durable", "ls")

	for _, restart := range []struct {
		what string
		do   func() error
	}{
		{"daemon stopped and started", func() error { return s.Daemon.Restart(t.Context()) }},
		{"daemon killed and started", func() error {
			return errors.Join(s.Daemon.Kill(), s.Daemon.Start(t.Context()))
		}},
		{"containerd stopped and started", func() error { return s.Containerd.Restart(t.Context()) }},
		{"containerd killed and started", func() error {
			return errors.Join(s.Containerd.Kill(), s.Containerd.Start(t.Context()))
		}},
		{"both stopped, containerd started first", func() error {
			return errors.Join(s.Daemon.Stop(), s.Containerd.Restart(t.Context()), s.Daemon.Start(t.Context()))
		}},
	} {
		if err := restart.do(); err != nil {
			t.Fatalf("%s: %v", restart.what, err)
		}
		s.reconnected(t)
		if now := s.ctr(t, "snapshot", "--snapshotter", "durable", "ls"); now != listed {
			t.Errorf("%s: snapshots were\n%s\nand are\n%s", restart.what, listed, now)
		}
		if d := kit.Diff(want, s.tree(t, "durable", img), 10); d != "" {
			t.Errorf("%s: the tree changed:\n%s", restart.what, d)
		}
		if out := s.ctr(t, "image", "check", "--snapshotter", "durable"); !strings.Contains(out, "complete") || !strings.Contains(out, "true") {
			t.Errorf("%s: image check: %s", restart.what, out)
		}
	}
	other := images.Get(t, "empty-layers")
	s.pull(t, "transfer", "durable", other)
	s.tree(t, "durable", other)
}

// tree mounts a view of the image, as a container would see it, and takes its
// fingerprint. Times that depend on the unpacking are left out.
func (s *stack) tree(t *testing.T, snapshotter string, img kit.Pushed) kit.Tree {
	t.Helper()
	client, err := s.Containerd.Client()
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	// The lease keeps garbage collection, which a pull sets off, from the view.
	ctx, release, err := client.WithLease(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	sn := client.SnapshotService(snapshotter)
	key := fmt.Sprintf("view-%d", time.Now().UnixNano())
	mounts, err := sn.View(ctx, key, img.Top())
	if err != nil {
		t.Fatalf("view of %s under %s: %v", img.Ref, snapshotter, err)
	}
	dir := scratch(t)
	if err := mount.All(mounts, dir); err != nil {
		t.Fatalf("mount %s under %s: %v", img.Ref, snapshotter, err)
	}
	tree, err := kit.Fingerprint(dir)
	if err = errors.Join(err, mount.UnmountAll(dir, 0), sn.Remove(ctx, key), release(ctx)); err != nil {
		t.Fatal(err)
	}
	tree.Untime(img.Untimed...)
	return tree
}

// layerDirs lists what is in the daemon's directory of snapshots.
func (s *stack) layerDirs(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(s.Daemon.Root, "snapshots"))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// waitLayerDirs waits until n directories are left: deletion may go on for a
// moment after the answer.
func (s *stack) waitLayerDirs(t *testing.T, n int) {
	t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for {
		names := s.layerDirs(t)
		if len(names) == n {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("directories in snapshots/: %q, want %d", names, n)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
