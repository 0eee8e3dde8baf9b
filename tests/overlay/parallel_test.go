package overlay

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/mount"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// eightLayers has what parallel unpacking is known to get wrong, and nothing
// that the built-in snapshotter gets wrong sequentially.
var eightLayers = image{
	{mkdir("etc").withMode(0o711).withOwner(0, 12), mkfile("etc/passwd"), mkdir("srv").withMode(0o1777), mkdir("home/user").withMode(0o700).withOwner(1000, 1000).withXattr("user.note", "mine"), mkfile("home/user/a")},
	{mkfile("home/user/b").withOwner(1000, 1000), rm("etc/passwd"), mkfile("srv/data/one")},
	{empty("srv/data"), mkfile("srv/data/two"), mklink("etc/two", "srv/data/two"), mksymlink("link", "etc")},
	{rm("home/user/a"), mkfile("home/user/sub/c")},
	{mkfile("etc/passwd").withMode(0o600), rm("srv/data"), mkfile("gone/soon")},
	{mkfile("srv/data"), rm("gone"), rm("link"), mkfile("bin/tool").withMode(0o4755).withXattr("security.capability", kit.Capability(1<<10))},
	{},
	{rm("srv/data"), mkdir("home/user").withMode(0o750).withOwner(1000, 1000), mkfile("home/user/sub/d"), mkfile("etc/deep/er/file")},
}

// puller is a node that pulls from its registry, with the daemon as one of
// containerd's snapshotters.
type puller struct {
	*kit.Node
	client *client.Client
	count  int
}

// newPuller starts a node that unpacks so many layers at a time. The daemon
// declares that a parent may come as late as Commit.
func newPuller(t *testing.T, unpacks int, cri *kit.CRIOptions) *puller {
	t.Helper()
	p := &puller{Node: kittest.StartNode(t, kit.NodeOptions{
		Registry:   must[*kit.Registry](t)(kit.StartRegistry(filepath.Join(scratch(t), "registry"))),
		Containerd: kit.ContainerdOptions{CRI: cri, Unpacks: unpacks},
	})}
	p.client = must[*client.Client](t)(p.Containerd.Client())
	t.Cleanup(func() { p.client.Close() })
	return p
}

func (p *puller) push(t *testing.T, img image) kit.Pushed {
	t.Helper()
	p.count++
	return must[kit.Pushed](t)(p.Push(t.Context(), fmt.Sprintf("image%d", p.count), img.kit()))
}

func (p *puller) pull(t *testing.T, img kit.Pushed, snapshotter string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err := p.Containerd.Ctr(ctx, "image", "pull", "--plain-http", "--snapshotter", snapshotter, img.Ref)
	check(t, err)
}

// view mounts what was pulled, as a container would.
func (p *puller) view(t *testing.T, img kit.Pushed, snapshotter string) (v view) {
	t.Helper()
	ctx, release, err := p.client.WithLease(t.Context())
	check(t, err)
	sn := p.client.SnapshotService(snapshotter)
	key := fmt.Sprintf("view-%d", time.Now().UnixNano())
	mounts := must[[]mount.Mount](t)(sn.View(ctx, key, img.Top()))
	check(t, mount.WithReadonlyTempMount(ctx, mounts, func(dir string) (err error) {
		v, err = readView(dir)
		return err
	}))
	check(t, sn.Remove(ctx, key))
	check(t, release(ctx))
	return v
}

// unpacked counts the unpackings that containerd's log calls parallel or not.
func (p *puller) unpacked(t *testing.T, parallel bool) int {
	t.Helper()
	n := 0
	for line := range strings.Lines(must[string](t)(p.Containerd.Log())) {
		if strings.Contains(line, "image unpacked") && strings.Contains(line, fmt.Sprintf("parallel=%v", parallel)) {
			n++
		}
	}
	return n
}

// TestPullInParallel pulls with a real containerd: eight layers at once, and
// again where the lower half of the chain is there already.
func TestPullInParallel(t *testing.T) {
	want := reference(eightLayers).view()
	for _, unpacks := range []int{1, 3, 8} {
		t.Run(fmt.Sprint(unpacks), func(t *testing.T) {
			p, pulls := newPuller(t, unpacks, nil), 0
			pull := func(img kit.Pushed) {
				t.Helper()
				p.pull(t, img, durable)
				pulls++
			}
			whole := p.push(t, eightLayers)
			if unpacks == 1 {
				p.pull(t, whole, overlayfs)
				if text := want.diff(p.view(t, whole, overlayfs), eightLayers); text != "" {
					t.Errorf("the built-in snapshotter, one layer at a time:\n%s", text)
				}
			}
			pull(whole)
			if text := want.diff(p.view(t, whole, durable), eightLayers); text != "" {
				t.Errorf("eight layers:\n%s", text)
			}
			// Another image, of which every kind of head is there before the rest.
			for head := 1; head < len(eightLayers); head += kittest.Step(2) {
				first := mkfile("first").withTime(time.Unix(int64(head), 0))
				other := append(image{{first}}, eightLayers...)
				pull(p.push(t, other[:head+1]))
				all := p.push(t, other)
				pull(all)
				if text := reference(other).view().diff(p.view(t, all, durable), other); text != "" {
					t.Errorf("eight layers, of which %d were there:\n%s", head, text)
				}
			}
			for i := range uint64(6) {
				img := generate(*seed, i)
				pushed := p.push(t, img)
				pull(pushed)
				if text := reference(img).view().diff(p.view(t, pushed, durable), img); text != "" {
					t.Errorf("image %d of seed %d:\n%s%v", i, *seed, text, indent(img.String()))
				}
			}
			if n := p.unpacked(t, unpacks > 1); n < pulls {
				t.Errorf("containerd's log has %d unpackings with parallel=%v, of %d pulls", n, unpacks > 1, pulls)
			}
		})
	}
}
