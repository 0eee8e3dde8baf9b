package api

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// onDemandGC makes containerd collect garbage on request and at no
// other time: a view has neither lease nor label and would be gone any moment.
const onDemandGC = `
[plugins.'io.containerd.gc.v1.scheduler']
  startup_delay = '0s'
  deletion_threshold = 1000000
  mutation_threshold = 1000000
`

// TestVerbs goes through what `ctr snapshot` offers, as an administrator would.
func TestVerbs(t *testing.T) {
	s := newStack(t, kit.NodeOptions{Containerd: kit.ContainerdOptions{Extra: onDemandGC}})
	img := images.Get(t, "runnable")
	s.pull(t, "transfer", "durable", img)
	snapshot := func(args ...string) string {
		t.Helper()
		return s.ctr(t, append([]string{"snapshot", "--snapshotter", "durable"}, args...)...)
	}

	t.Run("ls", func(t *testing.T) {
		out := snapshot("ls")
		for _, chain := range img.ChainIDs {
			if !strings.Contains(out, chain.String()) {
				t.Errorf("%s is not listed:\n%s", chain, out)
			}
		}
		if n := strings.Count(out, "Committed"); n != len(img.ChainIDs) {
			t.Errorf("%d committed snapshots, want %d:\n%s", n, len(img.ChainIDs), out)
		}
	})
	t.Run("info", func(t *testing.T) {
		info := s.info(t, img.Top())
		if info.Kind != "Committed" || info.Name != img.Top() || info.Parent != img.ChainIDs[1].String() {
			t.Errorf("info of the top layer: %+v", info)
		}
	})
	t.Run("usage", func(t *testing.T) {
		// The middle layer holds the program, some megabytes.
		if got := s.usage(t, img.ChainIDs[1].String()); got < 1<<20 || got > 32<<20 {
			t.Errorf("usage of the program's layer: %d bytes", got)
		}
		if got := s.usage(t, img.Top()); got < 1 || got > 1<<20 {
			t.Errorf("usage of the top layer: %d bytes", got)
		}
	})
	t.Run("tree", func(t *testing.T) {
		var order []string
		for line := range strings.Lines(snapshot("tree")) {
			order = append(order, line[strings.Index(line, "sha256:"):len(line)-1])
		}
		var want []string
		for _, chain := range img.ChainIDs {
			want = append(want, chain.String())
		}
		if !slices.Equal(order, want) {
			t.Errorf("tree %q, want %q", order, want)
		}
	})

	dir := scratch(t)
	t.Run("prepare and mounts", func(t *testing.T) {
		printed := snapshot("prepare", "--mounts", "work", img.Top())
		var mounts []mount.Mount
		if err := json.Unmarshal([]byte(printed), &mounts); err != nil || len(mounts) != 1 || mounts[0].Type != "overlay" {
			t.Fatalf("mounts %s: %v", printed, err)
		}
		if line := snapshot("mounts", dir, "work"); !strings.HasPrefix(line, "mount -t overlay overlay "+dir+" -o ") {
			t.Errorf("mounts prints %q", line)
		}
		if err := mount.All(mounts, dir); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "etc", "added"), []byte("by hand"), 0o640); err != nil {
			t.Error(err)
		}
		if err := os.Remove(filepath.Join(dir, "bin", "again")); err != nil {
			t.Error(err)
		}
		if err := unix.Unmount(dir, 0); err != nil {
			t.Fatal(err)
		}
		if info := s.info(t, "work"); info.Kind != "Active" || info.Parent != img.Top() {
			t.Errorf("info of the active snapshot: %+v", info)
		}
		if got := s.usage(t, "work"); got < 1 {
			t.Errorf("usage of the active snapshot: %d bytes", got)
		}
	})
	t.Run("commit", func(t *testing.T) {
		snapshot("commit", "done", "work")
		if info := s.info(t, "done"); info.Kind != "Committed" || info.Parent != img.Top() {
			t.Errorf("info after the commit: %+v", info)
		}
		s.wantError(t, "not found", "info", "work")
	})
	t.Run("label", func(t *testing.T) {
		snapshot("label", "done", "colour=red")
		if got := s.info(t, "done").Labels["colour"]; got != "red" {
			t.Errorf("label is %q", got)
		}
		snapshot("label", "done", "colour=")
		if got, ok := s.info(t, "done").Labels["colour"]; ok {
			t.Errorf("label is still %q", got)
		}
	})
	t.Run("diff", func(t *testing.T) {
		names := tarNames(t, snapshot("diff", "done"))
		for _, want := range []string{"etc/added", "bin/.wh.again"} {
			if !slices.Contains(names, want) {
				t.Errorf("%s is not in the diff: %q", want, names)
			}
		}
	})
	t.Run("view", func(t *testing.T) {
		printed := snapshot("view", "--mounts", "done-view", "done")
		var mounts []mount.Mount
		if err := json.Unmarshal([]byte(printed), &mounts); err != nil {
			t.Fatalf("mounts %s: %v", printed, err)
		}
		if err := mount.All(mounts, dir); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(filepath.Join(dir, "etc", "added")); err != nil || string(b) != "by hand" {
			t.Errorf("file in the view: %q, %v", b, err)
		}
		if err := os.WriteFile(filepath.Join(dir, "no"), nil, 0o644); err == nil {
			t.Error("a view can be written to")
		}
		if err := unix.Unmount(dir, 0); err != nil {
			t.Fatal(err)
		}
		if info := s.info(t, "done-view"); info.Kind != "View" {
			t.Errorf("info of the view: %+v", info)
		}
	})
	t.Run("rm", func(t *testing.T) {
		s.wantError(t, "cannot remove snapshot with child", "rm", "done")
		snapshot("rm", "done-view")
		snapshot("rm", "done")
		s.wantError(t, "not found", "info", "done")
		s.collectGarbage(t)
		s.waitLayerDirs(t, len(img.Layers))
	})
	t.Run("unpack", func(t *testing.T) {
		// containerd keeps the layers' blobs: the image is still there.
		for _, chain := range slices.Backward(img.ChainIDs) {
			// Without the top one the image keeps none of them: containerd's garbage
			// collection may be quicker.
			_, err := s.Containerd.Ctr(t.Context(), "snapshot", "--snapshotter", "durable", "rm", chain.String())
			if err != nil && !strings.Contains(err.Error(), "not found") {
				t.Fatal(err)
			}
		}
		s.collectGarbage(t)
		s.waitLayerDirs(t, 0)
		s.ctr(t, "snapshot", "unpack", "--snapshotter", "durable", img.Manifest.String())
		s.waitLayerDirs(t, len(img.Layers))
		s.tree(t, "durable", img)
	})
}

// collectGarbage runs containerd's garbage collection and waits for its end.
func (s *stack) collectGarbage(t *testing.T) {
	t.Helper()
	s.ctr(t, "leases", "create", "--id", "collect")
	s.ctr(t, "leases", "rm", "--sync", "collect")
}

// snapshotInfo is what `ctr snapshot info` prints.
type snapshotInfo struct {
	Kind, Name, Parent string
	Labels             map[string]string
}

func (s *stack) info(t *testing.T, key string) (info snapshotInfo) {
	t.Helper()
	out := s.ctr(t, "snapshot", "--snapshotter", "durable", "info", key)
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		t.Fatalf("info %s: %v: %s", key, err, out)
	}
	return info
}

func (s *stack) usage(t *testing.T, key string) int64 {
	t.Helper()
	out := s.ctr(t, "snapshot", "--snapshotter", "durable", "usage", "-b", key)
	for line := range strings.Lines(out) {
		if fields := strings.Fields(line); len(fields) == 3 && fields[0] == key {
			n, err := strconv.ParseInt(fields[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("usage %s: %s", key, out)
	return 0
}

// wantError runs a verb that must fail, and for the reason given.
func (s *stack) wantError(t *testing.T, reason string, args ...string) {
	t.Helper()
	out, err := s.Containerd.Ctr(t.Context(), append([]string{"snapshot", "--snapshotter", "durable"}, args...)...)
	if err == nil || !strings.Contains(err.Error(), reason) {
		t.Errorf("snapshot %q: printed %q, error %v; want %q", args, out, err, reason)
	}
}

func tarNames(t *testing.T, gzipped string) []string {
	t.Helper()
	zr, err := gzip.NewReader(strings.NewReader(gzipped))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for tr := tar.NewReader(zr); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return names
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
	}
}
