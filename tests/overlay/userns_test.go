package overlay

import (
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/moby/sys/userns"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

const (
	usernsDir    = "OVERLAY_USERNS_DIR"
	usernsDaemon = "OVERLAY_USERNS_DAEMON"
)

// TestUserNamespace unpacks as a rootless containerd does, in a user namespace
// with a range of ids that are others outside. There the applier mounts a
// layer's snapshot and deletes what whiteouts remove; overlayfs turns that into
// marks of its own.
func TestUserNamespace(t *testing.T) {
	if dir := os.Getenv(usernsDir); dir != "" {
		inUserNamespace(t, dir)
		return
	}
	const first, count = 100_000, 1 << 22
	dir := newDisk(t, "ext4").Path("rootless")
	tmp := scratch(t)
	check(t, os.Mkdir(dir, 0o755))
	for _, d := range []string{dir, tmp} {
		check(t, os.Chown(d, first, first))
	}
	// Root of the namespace is an unprivileged user outside: it must be let through to its
	// directories, and have programs where it can reach them.
	for _, d := range []string{dir, tmp} {
		for ; d != path.Dir(os.TempDir()); d = path.Dir(d) {
			check(t, os.Chmod(d, 0o755))
		}
	}
	daemon := path.Join(dir, "daemon")
	body := must[[]byte](t)(os.ReadFile(kittest.Binaries(t).Daemon))
	check(t, os.WriteFile(daemon, body, 0o755))

	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestUserNamespace$", "-test.v")
	cmd.Env = append(os.Environ(), usernsDir+"="+dir, usernsDaemon+"="+daemon, "TMPDIR="+tmp)
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: first, Size: count}}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL,
		UidMappings: ids, GidMappings: ids, GidMappingsEnableSetgroups: true,
		Credential: &syscall.Credential{},
	}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestUserNamespace") {
		t.Errorf("in the user namespace: %v\n%s", err, out)
	}
}

func inUserNamespace(t *testing.T, dir string) {
	if !userns.RunningInUserNS() {
		t.Fatal("this is no user namespace")
	}
	n := newNodeIn(t, dir, os.Getenv(usernsDaemon), "")
	t.Run("eight layers", func(t *testing.T) { rootless(t, n, forNaive(eightLayers)) })
	t.Run("opaque root", func(t *testing.T) {
		rootless(t, n, image{{mkfile("old"), mkfile("d/old")}, {empty("."), mkfile("new"), mkfile("d/new")}, {mkfile("d/last")}})
	})
	t.Run("in parallel", func(t *testing.T) {
		// The applier would lose the whiteouts of a layer without its parents.
		_, err := n.unpack(t.Context(), eightLayers, durable, 3)
		for _, word := range []string{"user namespace", "rebase"} {
			if err == nil || !strings.Contains(err.Error(), word) {
				t.Errorf("want a refusal that contains %q, got: %v", word, err)
			}
		}
	})
	t.Run("generated", func(t *testing.T) {
		tested := 0
		for i := uint64(0); tested < 60; i++ {
			if img := forNaive(generate(*seed, i)); img != nil {
				tested++
				rootless(t, n, img)
			}
			if t.Failed() {
				return
			}
		}
	})
}

// rootless unpacks an image sequentially and compares.
func rootless(t *testing.T, n *node, img image) {
	t.Helper()
	if err := n.compare(t.Context(), img, ways[0]); err != nil {
		t.Errorf("%v\n%v", err, indent(img.String()))
	}
}

// forNaive leaves out of an image what the applier skips or gets wrong when it
// works on a mount, and returns nil when that does not help: devices cannot be
// made in a user namespace; xattrs of a lower directory stay; an opaque mark
// takes along what was made before it without an entry; a parent that is no
// directory is an error, and a symlink is followed.
func forNaive(img image) image {
	out := img.clone()
	for i, l := range out {
		l = slices.DeleteFunc(l, func(e entry) bool { return e.kind == char || e.kind == block })
		for k := range l {
			if l[k].kind == dir {
				l[k].xattrs = nil
			}
		}
		slices.SortStableFunc(l, func(a, b entry) int { return rank(a) - rank(b) })
		out[i] = l
	}
	if accepted(out) != nil {
		return nil
	}
	root := newDirectory()
	for _, l := range out {
		for _, e := range l {
			for p := path.Dir(e.path); p != "."; p = path.Dir(p) {
				if root.find(p) == nil && root.has(p) {
					return nil
				}
			}
		}
		root.apply(l)
	}
	return out
}

// rank puts opaque marks first, outer ones before inner ones, then whiteouts.
func rank(e entry) int {
	switch e.kind {
	case opaque:
		return len(parts(e.path))
	case whiteout:
		return 1 << 20
	}
	return 1 << 21
}
