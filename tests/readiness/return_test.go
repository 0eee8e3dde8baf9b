package readiness

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestDropWhenContainerdReturns: what is due is done as soon as containerd returns,
// however long it was away. There is no CRI plugin, whose questions at containerd's
// start would have the same effect.
func TestDropWhenContainerdReturns(t *testing.T) {
	n := kittest.NewNode(t, kit.NodeOptions{
		Registry: must[*kit.Registry](t)(kit.StartRegistry(filepath.Join(scratch(t), "registry"))),
		Heals:    true, Notifies: true,
	})
	kittest.Start(t, n)
	img := must[kit.Pushed](t)(n.Push(t.Context(), "app", must[kit.Image](t)(kit.Runnable(t.Context()))))
	pull := func() {
		t.Helper()
		must[string](t)(n.Ctr(t.Context(), "image", "pull", "--plain-http", "--snapshotter", "durable", img.Ref))
	}
	pull()
	for _, l := range must[kit.Report](t)(n.Daemon.Inspect(t.Context())).Layers {
		if l.ChainID == img.Top() {
			check(t, os.RemoveAll(filepath.Join(n.Daemon.Root, "snapshots", strconv.FormatUint(l.ID, 10))))
		}
	}
	check(t, os.Remove(n.Blob(img.Layers[len(img.Layers)-1].Digest)))
	check(t, n.Containerd.Stop())
	check(t, n.Daemon.Kill())
	check(t, n.Daemon.Start(t.Context()))
	// Meanwhile the pauses between attempts grow to half a minute.
	time.Sleep(35 * time.Second)
	check(t, n.StartContainerd(t.Context()))
	began := time.Now()
	waitFor(t, time.Minute, func() error {
		ctx, cl, err := n.Client(t.Context())
		if err != nil {
			return err
		}
		defer cl.Close()
		names, err := records{ctx, cl}.names(img)
		if err == nil && len(names) > 0 {
			err = fmt.Errorf("containerd has the names %q", names)
		}
		return err
	})
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("the image was dropped %v after containerd's return", took)
	} else {
		t.Logf("dropped %v after containerd's return", took)
	}
	pull()
}
