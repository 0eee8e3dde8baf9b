package readiness

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/defects"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// fromDisk is the defect that takes attributes from the trees of the parents.
var fromDisk = defects.Activate("inherit-from-disk")

// heritage is a containerd that pulls images whose upper layers put something into a
// private directory of the base, and have no entry of it.
type heritage struct {
	*kit.Node
	images int
}

// newHeritage starts it, with parallel unpacking or not, and with the environment of
// a faulty daemon.
func newHeritage(t *testing.T, rebase bool, env ...string) *heritage {
	t.Helper()
	o := kit.NodeOptions{
		Registry: must[*kit.Registry](t)(kit.StartRegistry(filepath.Join(scratch(t), "registry"))),
		Heals:    true, Notifies: true,
	}
	o.Containerd.CRI = &kit.CRIOptions{Pause: o.Registry.Ref("none")}
	if rebase {
		o.Containerd.Unpacks = rebaseUnpacks
	}
	h := &heritage{Node: kittest.NewNode(t, o)}
	h.use(t, env...)
	kittest.Start(t, h.Node)
	return h
}

// use has the daemon's next start be that of the faulty one, when there is an
// environment for it.
func (h *heritage) use(t *testing.T, env ...string) {
	t.Helper()
	binary := kittest.Binaries(t).Daemon
	if len(env) > 0 {
		binary = must[string](t)(faulty())
	}
	h.Daemon.Use(binary, env...)
}

// start starts the daemon without defects, instead of the one that runs.
func (h *heritage) start(t *testing.T) {
	t.Helper()
	check(t, h.Daemon.Stop())
	h.use(t)
	check(t, h.Daemon.Start(t.Context()))
}

// push makes a chain of layers, and an image of each of its heads from the base on.
func (h *heritage) push(t *testing.T) (heads []kit.Pushed) {
	t.Helper()
	h.images++
	all := kit.Image{Cmd: []string{"/x"}, Layers: []kit.Layer{
		kit.NewLayer(kit.Gzip, kit.Dir("priv", 0o700).WithOwner(1000, 1001), kit.File("priv/secret", 0o600, fmt.Sprint("of image ", h.images)).WithOwner(1000, 1001)),
		kit.NewLayer(kit.Gzip, kit.File("between", 0o644, "x")),
		kit.NewLayer(kit.Gzip, kit.File("priv/x/y", 0o644, "y")),
		kit.NewLayer(kit.Gzip, kit.File("priv/x/z", 0o644, "z")),
	}}
	for n := range all.Layers {
		heads = append(heads, must[kit.Pushed](t)(h.Push(t.Context(), fmt.Sprintf("image%d-%d", h.images, n), kit.Image{Cmd: all.Cmd, Layers: all.Layers[:n+1]})))
	}
	return heads
}

func (h *heritage) pull(t *testing.T, way kit.Way, img kit.Pushed) error {
	t.Helper()
	ctx, cancel := within(t)
	defer cancel()
	if way == kit.ByCRI {
		return h.CRI.Pull(ctx, img.Ref)
	}
	args := []string{"image", "pull", "--plain-http", "--snapshotter", "durable", img.Ref}
	if way == kit.ByClient {
		args = slices.Insert(args, 2, "--local")
	}
	_, err := h.Containerd.Ctr(ctx, args...)
	return err
}

// fs is the daemon's directory of an image's top layer.
func (h *heritage) fs(t *testing.T, img kit.Pushed) string {
	t.Helper()
	r := kittest.Inspect(t, h.Daemon)
	for _, e := range r.Journal.Committed {
		if e.ChainID == img.Top() {
			return h.Daemon.LayerDir(e.ID)
		}
	}
	t.Fatalf("no layer %s in %+v", img.Top(), r.Journal.Committed)
	return ""
}

// verb runs a verb of the daemon's program beside it, and returns its standard output
// and exit status.
func (h *heritage) verb(t *testing.T, args ...string) (string, int) {
	t.Helper()
	out, _, code := kittest.Verb(t, h.Daemon, args...)
	return out, code
}

// privacy returns what is wrong with the private directory that a container of an
// image sees.
func (h *heritage) privacy(t *testing.T, way kit.Way, img kit.Pushed) (wrong error) {
	t.Helper()
	ns := h.Containerd.Namespace
	if way == kit.ByCRI {
		ns = k8s
	}
	cl := must[*client.Client](t)(client.New(h.Containerd.Address))
	defer cl.Close()
	ctx, release, err := cl.WithLease(namespaces.WithNamespace(t.Context(), ns))
	check(t, err)
	defer func() { check(t, release(ctx)) }()
	sn := cl.SnapshotService("durable")
	key := fmt.Sprintf("view-%d", time.Now().UnixNano())
	mounts, err := sn.View(ctx, key, img.Top())
	if err != nil {
		return err
	}
	defer func() { check(t, sn.Remove(ctx, key)) }()
	check(t, mount.WithReadonlyTempMount(ctx, mounts, func(root string) error {
		wrong = isPrivate(filepath.Join(root, "priv"))
		return nil
	}))
	return wrong
}

func isPrivate(path string) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	if st.Mode != unix.S_IFDIR|0o700 || st.Uid != 1000 || st.Gid != 1001 {
		return fmt.Errorf("%s is %o %d:%d", path, st.Mode, st.Uid, st.Gid)
	}
	return nil
}

// onDamagedBase pulls the base, takes the private directory away from it, and pulls
// the image with the layer that inherits from it.
func (h *heritage) onDamagedBase(t *testing.T, way kit.Way, heads []kit.Pushed) {
	t.Helper()
	check(t, h.pull(t, way, heads[0]))
	check(t, os.RemoveAll(filepath.Join(h.fs(t, heads[0]), "priv")))
	check(t, h.pull(t, way, heads[2]))
}

// repaired runs repair until nothing is damaged, and fails unless check --deep finds
// all layers ready.
func (h *heritage) repaired(t *testing.T, args ...string) {
	t.Helper()
	if out, code := h.verb(t, append([]string{"repair", "--apply"}, args...)...); code != 0 {
		t.Errorf("repair %q: exit %d: %s", args, code, out)
	}
	if out, code := h.verb(t, "check", "--deep"); code != 0 || !strings.Contains(out, "ready") {
		t.Errorf("check --deep: exit %d: %s", code, out)
	}
}

// TestInheritedFromDamagedParent: a layer is pulled on a base that has lost, unnoticed,
// the directory that the layer inherits from. It has the owner and mode of the base's
// tar at once, and after the base was healed, and was right from the beginning.
func TestInheritedFromDamagedParent(t *testing.T) {
	t.Parallel()
	for _, rebase := range []bool{false, true} {
		t.Run(fmt.Sprint("rebase=", rebase), func(t *testing.T) {
			h := newHeritage(t, rebase)
			for _, way := range kit.Ways {
				heads := h.push(t)
				h.onDamagedBase(t, way, heads)
				fs := h.fs(t, heads[2])
				before := must[os.FileInfo](t)(os.Stat(fs))
				if err := h.privacy(t, way, heads[2]); err != nil {
					t.Errorf("%s: at once: %v", way, err)
				}
				h.repaired(t, "--deep")
				if err := h.privacy(t, way, heads[2]); err != nil {
					t.Errorf("%s: after the repair: %v", way, err)
				}
				check(t, isPrivate(filepath.Join(h.fs(t, heads[0]), "priv")))
				if !os.SameFile(before, must[os.FileInfo](t)(os.Stat(fs))) {
					t.Errorf("%s: the layer was replaced, although it was right", way)
				}
			}
			if log := must[string](t)(h.Containerd.Log()); strings.Contains(log, "parallel=true") != rebase {
				t.Errorf("rebase %v, and containerd's log has no word of it", rebase)
			}
		})
	}
}

// TestInheritedDefect: the test above sees the planted defect, for ever: the old
// daemon never finds what it has sealed.
func TestInheritedDefect(t *testing.T) {
	t.Parallel()
	h := newHeritage(t, false, fromDisk)
	heads := h.push(t)
	h.onDamagedBase(t, kit.ByTransfer, heads)
	if h.privacy(t, kit.ByTransfer, heads[2]) == nil {
		t.Error("the planted defect is not seen at once")
	}
	h.repaired(t, "--deep")
	if h.privacy(t, kit.ByTransfer, heads[2]) == nil {
		t.Error("the planted defect is not seen after the repair")
	}
}

// TestInheritedByOlderVersion: layers that an older version has sealed with what a
// damaged base had are found and extracted again: when the base is healed, and when a
// daemon starts whose base was healed before. Images and names stay.
func TestInheritedByOlderVersion(t *testing.T) {
	t.Parallel()
	for _, rebase := range []bool{false, true} {
		for name, mend := range map[string]func(t *testing.T, h *heritage){
			"base healed": func(t *testing.T, h *heritage) {
				h.start(t)
				_, _ = h.verb(t, "repair", "--apply") // the exit status is that of its own verification
			},
			"base healed before": func(t *testing.T, h *heritage) {
				_, _ = h.verb(t, "repair", "--apply")
				h.start(t)
			},
			"deep": func(t *testing.T, h *heritage) {
				h.start(t)
				h.repaired(t, "--deep")
			},
		} {
			t.Run(fmt.Sprintf("rebase=%v,%s", rebase, name), func(t *testing.T) {
				h := newHeritage(t, rebase, fromDisk)
				way := kit.ByTransfer
				heads := h.push(t)
				h.onDamagedBase(t, way, heads)
				check(t, h.pull(t, way, heads[3]))
				trees := []string{h.fs(t, heads[2]), h.fs(t, heads[3])}
				for _, fs := range trees {
					if isPrivate(filepath.Join(fs, "priv")) == nil {
						t.Fatalf("the defect is not there: %s", fs)
					}
				}
				mend(t, h)
				for _, img := range heads[2:] {
					waitFor(t, time.Minute, func() error { return isPrivate(filepath.Join(h.fs(t, img), "priv")) })
					waitFor(t, time.Minute, func() error { return h.privacy(t, way, img) })
				}
				h.repaired(t, "--deep")
				out := must[string](t)(h.Containerd.Ctr(t.Context(), "images", "ls", "-q"))
				for _, i := range []int{0, 2, 3} {
					if !strings.Contains(out, heads[i].Ref) {
						t.Errorf("image %s is gone: %s", heads[i].Ref, out)
					}
				}
			})
		}
	}
}

// TestInheritedWithoutSeal: the base has lost its seal, so that it is not known what is
// to be inherited. The pull fails and reports why; the base is healed meanwhile, and
// another pull succeeds.
func TestInheritedWithoutSeal(t *testing.T) {
	t.Parallel()
	for _, rebase := range []bool{false, true} {
		t.Run(fmt.Sprint("rebase=", rebase), func(t *testing.T) {
			h := newHeritage(t, rebase)
			for _, way := range kit.Ways {
				heads := h.push(t)
				check(t, h.pull(t, way, heads[0]))
				fs := h.fs(t, heads[0])
				before := must[os.FileInfo](t)(os.Stat(fs))
				check(t, os.Remove(filepath.Join(filepath.Dir(fs), "seal")))
				if err := h.pull(t, way, heads[2]); err == nil || !strings.Contains(err.Error(), "is being verified") {
					t.Errorf("%s: a pull on a base without a seal: %v", way, err)
				}
				waitFor(t, time.Minute, func() error {
					if os.SameFile(before, must[os.FileInfo](t)(os.Stat(fs))) {
						return errors.New("the base is not healed")
					}
					return nil
				})
				// What the failed pull has committed belongs to no lease. A collection between
				// two calls of this client would take it (pkg/rootfs/apply.go does not try again).
				collect(t, h.Node)
				check(t, h.pull(t, way, heads[2]))
				if err := h.privacy(t, way, heads[2]); err != nil {
					t.Errorf("%s: %v", way, err)
				}
				h.repaired(t, "--deep")
			}
		})
	}
}
