package api

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestDebianContainerd puts the daemon under the containerd that Debian 12
// ships, an older client of the same API with an older configuration.
func TestDebianContainerd(t *testing.T) {
	bins := kittest.Release(t, kit.Debian)
	version, err := exec.Command(bins.Containerd, "--version").Output()
	if err != nil || !strings.Contains(string(version), " 1.6.") {
		t.Fatalf("Debian's containerd prints %q (%v), want 1.6", version, err)
	}
	s := newStack(t, kit.NodeOptions{Containerd: kit.ContainerdOptions{Binaries: bins, ConfigVersion: kit.ConfigVersion(kit.Debian)}})
	for _, name := range []string{"all-kinds", "empty-layers", "runnable"} {
		t.Run(name, func(t *testing.T) {
			img := images.Get(t, name)
			// This ctr knows no transfer service: all its pulls are local.
			s.pull(t, "transfer", "overlayfs", img)
			s.pull(t, "transfer", "durable", img)
			want, got := s.tree(t, "overlayfs", img), s.tree(t, "durable", img)
			if d := kit.Diff(want, got, 10); d != "" {
				t.Errorf("the tree under durable is not that under overlayfs:\n%s", d)
			}
		})
	}
	img := images.Get(t, "runnable")
	if got := s.ctr(t, "run", "--rm", "--snapshotter", "durable", img.Ref, "once"); got != "hello from the image\n" {
		t.Errorf("container printed %q", got)
	}
	s.runDetached(t, img.Ref, "lasting")
	if err := s.Daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := s.Daemon.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := s.exec(t, "lasting", "cat", "/etc/motd"); got != "third layer\n" {
		t.Errorf("a file of the image after the daemon came back: %q", got)
	}
	// Otherwise the collection could fall into the moment before containerd has
	// connected again; it does not come back to a snapshotter it could not reach.
	s.reconnected(t)
	for _, name := range []string{"all-kinds", "empty-layers"} {
		s.ctr(t, "image", "rm", "--sync", images.Get(t, name).Ref)
	}
	// The running container holds its image's three layers and its own.
	s.waitLayerDirs(t, len(img.Layers)+1)
}
