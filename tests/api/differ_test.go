package api

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	"github.com/containerd/containerd/v2/core/diff"
	diffproxy "github.com/containerd/containerd/v2/core/diff/proxy"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/durable-snapshotter/durable-snapshotter/internal/inflate"
	"github.com/durable-snapshotter/durable-snapshotter/internal/metrics"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// strategies counts the ways in which the layers of an image were made durable.
func (s *stack) strategies(t *testing.T, img kit.Pushed) map[string]int {
	t.Helper()
	r, err := s.Daemon.Inspect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n := map[string]int{}
	for _, e := range r.Journal.Committed {
		for _, id := range img.ChainIDs {
			if e.ChainID == id.String() {
				n[e.Strategy]++
			}
		}
	}
	return n
}

// handedOn is how many layers our differ has left to containerd's.
func (s *stack) handedOn(t *testing.T) int {
	t.Helper()
	text, err := os.ReadFile(s.Daemon.LogPath())
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(text), "a layer is handed on")
}

// TestDiffer pulls by every way, one layer after another and in parallel, with our diff
// service. The trees are those of the built-in overlayfs. A layer is synced in Commit only
// if it was extracted in parallel and has something of its parent.
func TestDiffer(t *testing.T) {
	// One layer after another: in parallel, attributes of parents are lost there.
	builtIn, want := newStack(t, kit.NodeOptions{BuiltIn: true}), map[string]kit.Tree{}
	for _, name := range []string{"all-kinds", "empty-layers", "runnable", "large"} {
		img := images.Get(t, name)
		builtIn.pull(t, "transfer", "overlayfs", img)
		want[name] = builtIn.tree(t, "overlayfs", img)
	}
	for _, unpacks := range []int{0, 3} {
		for i, way := range []kit.Way{kit.ByTransfer, kit.ByClient, kit.ByCRI} {
			if !kittest.Turn(i+unpacks, 2) {
				continue
			}
			t.Run(fmt.Sprintf("%s/%d", way, unpacks), func(t *testing.T) {
				runnable := images.Get(t, "runnable")
				// Blobs are read on disk, or else through containerd.
				s := newStack(t, kit.NodeOptions{Heals: unpacks == 0, Notifies: true, Containerd: kit.ContainerdOptions{
					Differ: []string{"durable"}, Unpacks: unpacks, Extra: kit.DifferFirst, CRI: &kit.CRIOptions{Pause: runnable.Ref},
				}})
				client, err := s.Containerd.Client()
				if err != nil {
					t.Fatal(err)
				}
				defer client.Close()
				for _, name := range []string{"all-kinds", "empty-layers", "runnable", "large"} {
					if name == "large" && (way != kit.ByTransfer || unpacks == 0) {
						continue // it is the same extraction
					}
					img := images.Get(t, name)
					namespace := s.Containerd.Namespace
					if way == kit.ByCRI {
						namespace = kit.CRINamespace
					}
					p := kit.Puller{Client: client, CRI: s.CRI, Snapshotter: "durable", Unpacks: unpacks}
					if err := p.Pull(t.Context(), way, namespace, img.Ref); err != nil {
						t.Fatal(err)
					}
					got, _, err := p.View(t.Context(), namespace, img.Top())
					if err != nil {
						t.Fatal(err)
					}
					got.Untime(img.Untimed...)
					if d := kit.Diff(want[name], got, 10); d != "" {
						t.Errorf("%s: the tree is not that under overlayfs:\n%s", name, d)
					}
					if n := s.handedOn(t); n != 0 {
						t.Errorf("%d layers were handed on", n)
					}
					n := s.strategies(t, img)
					t.Logf("%s: %v", name, n)
					if n[string(storage.StrategyApplied)] == 0 || unpacks == 0 && len(n) > 1 {
						t.Errorf("%s: %v", name, n)
					}
				}
				all, status, err := s.Daemon.Verdicts(t.Context(), "check", "--deep")
				if err != nil || status != 0 {
					t.Errorf("check: %d, %v, %v", status, all, err)
				}
			})
		}
	}
}

// TestDifferHandsOn: what our differ does not do is done all the same, by containerd's own.
// Where containerd's diff service begins with ours, a layer that comes back from it goes
// on to the next.
func TestDifferHandsOn(t *testing.T) {
	for _, extra := range []string{"", kit.DifferFirst} {
		t.Run(fmt.Sprintf("%d", len(extra)), func(t *testing.T) {
			s := newStack(t, kit.NodeOptions{Heals: true, Notifies: true, Containerd: kit.ContainerdOptions{
				Differ: []string{"durable", "overlayfs"},
				Extra: extra + "[stream_processors.secret]\n  accepts = ['application/vnd.oci.image.layer.v1.tar+secret']\n" +
					"  returns = 'application/vnd.oci.image.layer.v1.tar+gzip'\n  path = 'cat'\n",
			}})
			img := images.Get(t, "all-kinds")
			s.pull(t, "transfer", "overlayfs", img)
			if n := s.handedOn(t); n != len(img.Layers) && (extra == "" || n != 2*len(img.Layers)) {
				t.Errorf("%d of %d layers of the built-in overlayfs were handed on", n, len(img.Layers))
			}
			s.pull(t, "transfer", "durable", img)
			if d := kit.Diff(s.tree(t, "overlayfs", img), s.tree(t, "durable", img), 10); d != "" {
				t.Errorf("the tree is not that under overlayfs:\n%s", d)
			}

			// An encrypted layer: only containerd has its key. Here it is the first of the
			// image, as containerd's transfer service would send it.
			client, err := s.Containerd.Client()
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			conn, err := grpc.NewClient("unix://"+s.Daemon.Address, grpc.WithTransportCredentials(insecure.NewCredentials()))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			ours := diffproxy.NewDiffApplier(diffapi.NewDiffClient(conn)).(diff.Applier)
			ctx, release, err := client.WithLease(namespaces.WithNamespace(t.Context(), s.Containerd.Namespace))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = release(context.WithoutCancel(ctx)) }()
			desc := gzipped(t, img)
			desc.MediaType = ocispec.MediaTypeImageLayer + "+secret"
			sn := client.SnapshotService("durable")
			key := fmt.Sprintf(snapshots.UnpackKeyFormat, "secret", img.ChainIDs[0])
			mounts, err := sn.Prepare(ctx, key, "", snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: "sha256:" + strings.Repeat("5", 64)}))
			if err != nil {
				t.Fatal(err)
			}
			before := s.handedOn(t)
			if _, err := ours.Apply(ctx, desc, mounts); err != nil {
				t.Error(err)
			}
			if s.handedOn(t) == before {
				t.Error("the encrypted layer was not handed on")
			}
			if err := sn.Commit(ctx, "sha256:"+strings.Repeat("5", 64), key); err != nil {
				t.Error(err)
			}
			// What nobody does is NotImplemented or no processor, and no loop.
			desc.MediaType = "application/vnd.example.unknown"
			if _, err := ours.Apply(ctx, desc, []mount.Mount{{Type: "bind", Source: scratch(t), Options: []string{"rw", "rbind"}}}); err == nil {
				t.Error("an unknown media type was applied")
			}
			// Diff is not ours.
			if _, err := diffapi.NewDiffClient(conn).Diff(ctx, &diffapi.DiffRequest{}); err == nil || !strings.Contains(err.Error(), "Unimplemented") {
				t.Errorf("Diff: %v", err)
			}
			// Not on the image of all kinds: containerd's differ does not know some of them.
			runnable := images.Get(t, "runnable")
			s.pull(t, "transfer", "durable", runnable)
			s.ctr(t, "snapshot", "--snapshotter", "durable", "prepare", "mine", runnable.Top())
			r, err := s.Daemon.Inspect(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for _, row := range r.Snapshots {
				if strings.HasSuffix(row.Name, "/mine") {
					kittest.Check(t, os.WriteFile(s.Daemon.LayerDir(row.ID)+"/written", []byte("by a container"), 0o600))
				}
			}
			if out := s.ctr(t, "snapshot", "--snapshotter", "durable", "diff", "mine"); len(out) < 100 {
				t.Errorf("ctr snapshot diff has made %d bytes", len(out))
			}
		})
	}
}

// gzipped is a layer of the image that is compressed with gzip.
func gzipped(t *testing.T, img kit.Pushed) ocispec.Descriptor {
	t.Helper()
	for _, l := range img.Layers {
		if l.MediaType == ocispec.MediaTypeImageLayerGzip {
			return l
		}
	}
	t.Fatal("no layer is compressed with gzip")
	return ocispec.Descriptor{}
}

// TestDifferInterrupted: the daemon or containerd is killed, or the client goes away, while
// a layer is extracted. The next pull is clean, and nothing is left.
func TestDifferInterrupted(t *testing.T) {
	img := images.Get(t, "large")
	s := newStack(t, kit.NodeOptions{Heals: true, Notifies: true, Containerd: kit.ContainerdOptions{Differ: []string{"durable"}}})
	for i, how := range []string{"daemon killed", "client gone", "containerd killed"} {
		after := []time.Duration{300 * time.Millisecond, 900 * time.Millisecond}[i%2]
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			_, err := s.Ctr(ctx, "image", "pull", "--plain-http", "--snapshotter", "durable", img.Ref)
			done <- err
		}()
		waitFor(t, "the extraction", func() bool { return s.applying(t) })
		time.Sleep(after)
		switch how {
		case "daemon killed":
			kittest.Check(t, errors.Join(s.Daemon.Kill(), s.Daemon.Start(t.Context())))
		case "client gone":
			cancel()
		case "containerd killed":
			kittest.Check(t, errors.Join(s.Containerd.Kill(), s.Containerd.Start(t.Context())))
		}
		err := <-done
		cancel()
		t.Logf("%s after %v: %v", how, after, err)
		s.pullReconnected(t, img)
		if n := s.strategies(t, img); n[string(storage.StrategyApplied)] != len(img.Layers) {
			t.Errorf("%s: %v", how, n)
		}
		for _, lease := range strings.Fields(s.ctr(t, "leases", "ls", "--quiet")) { // of a client that is gone
			s.ctr(t, "leases", "rm", lease)
		}
		s.ctr(t, "image", "rm", "--sync", img.Ref)
		s.ctr(t, "content", "prune", "references")
		s.waitLayerDirs(t, 0)
	}
	s.pull(t, "transfer", "overlayfs", img)
	s.pull(t, "transfer", "durable", img)
	if d := kit.Diff(s.tree(t, "overlayfs", img), s.tree(t, "durable", img), 10); d != "" {
		t.Errorf("the tree is not that under overlayfs:\n%s", d)
	}
}

// pullReconnected pulls when containerd is connected again to the daemon. It makes the
// connections of its proxy plugins one by one.
func (s *stack) pullReconnected(t *testing.T, img kit.Pushed) {
	t.Helper()
	waitFor(t, "a connection", func() bool {
		_, err := s.Ctr(t.Context(), "image", "pull", "--plain-http", "--snapshotter", "durable", img.Ref)
		if err != nil && !strings.Contains(err.Error(), "connection refused") && !strings.Contains(err.Error(), "error reading from server") {
			t.Fatal(err)
		}
		return err == nil
	})
}

// applying reports whether a layer is being extracted.
func (s *stack) applying(t *testing.T) bool {
	for _, dir := range s.layerDirs(t) {
		if _, err := os.Stat(s.Daemon.Root + "/snapshots/" + dir + "/applied"); err == nil {
			return true
		}
	}
	return false
}

// waitFor waits until something is so.
func waitFor(t *testing.T, what string, is func() bool) {
	t.Helper()
	kittest.WaitFor(t, time.Minute, func() error {
		if !is() {
			return errors.New("there is not yet " + what)
		}
		return nil
	})
}

// TestDifferDown: containerd answers with an error while the daemon is down, and the next
// pull succeeds. Where the diff service begins with ours, that is so for every
// snapshotter; where only unpack_config names it, overlayfs does not notice.
func TestDifferDown(t *testing.T) {
	img := images.Get(t, "empty-layers")
	for _, extra := range []string{"", kit.DifferFirst} {
		s := newStack(t, kit.NodeOptions{Heals: true, Notifies: true, Containerd: kit.ContainerdOptions{Differ: []string{"durable"}, Extra: extra}})
		kittest.Check(t, s.Daemon.Kill())
		_, err := s.Ctr(t.Context(), "image", "pull", "--plain-http", "--local", "--snapshotter", "overlayfs", img.Ref)
		if (err != nil) != (extra == kit.DifferFirst) {
			t.Errorf("overlayfs by the diff service: %v", err)
		}
		if _, err := s.Ctr(t.Context(), "image", "pull", "--plain-http", "--snapshotter", "durable", img.Ref); err == nil {
			t.Error("pulled without a daemon")
		}
		kittest.Check(t, s.Daemon.Start(t.Context()))
		s.pullReconnected(t, img)
		s.pull(t, "local", "overlayfs", img)
	}
}

// TestRemoveDuringSync: containerd collects a snapshot whose layer our diff service is just
// syncing, under its write lock. Remove does not wait for the disk.
func TestRemoveDuringSync(t *testing.T) {
	img := images.Get(t, "all-kinds")
	s := newStack(t, kit.NodeOptions{
		Heals: true, Notifies: true, Daemon: kit.DaemonOptions{Config: "[diff]\nsync = 'syncfs'\n"},
		Containerd: kit.ContainerdOptions{Differ: []string{"durable"}},
	})
	sn := kittest.Connect(t, s.Daemon)
	syncs := kittest.HoldSyncs(t, s.Daemon.PID())
	pulled := make(chan error, 1)
	go func() {
		_, err := s.Ctr(t.Context(), "image", "pull", "--plain-http", "--snapshotter", "durable", img.Ref)
		pulled <- err
	}()
	waitFor(t, "a sync", syncs.Holds)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	n := 0
	for _, row := range kittest.Inspect(t, s.Daemon).Snapshots {
		if _, err := os.Stat(filepath.Join(s.Daemon.SnapshotDir(row.ID), "applied")); err == nil {
			kittest.Check(t, sn.Remove(ctx, row.Name))
			n++
		}
	}
	if n == 0 {
		t.Error("no layer was being applied")
	}
	syncs.Release()
	if err := <-pulled; err == nil {
		t.Error("a pull has succeeded although its snapshot was removed")
	}
	s.pull(t, "transfer", "durable", img)
}

// TestDecompressor: gzip is decompressed in the daemon, and by igzip where the
// configuration names it.
func TestDecompressor(t *testing.T) {
	if inflate.Igzip() == "" {
		t.Skip("igzip is not installed (package isal)")
	}
	img := images.Get(t, "runnable")
	for setting, igzip := range map[string]bool{"auto": false, "internal": false, "igzip": true} {
		s := newStack(t, kit.NodeOptions{
			Heals: true, Notifies: true, Daemon: kit.DaemonOptions{Config: fmt.Sprintf("[diff]\ndecompressor = %q\n", setting)},
			Containerd: kit.ContainerdOptions{Differ: []string{"durable"}},
		})
		s.pull(t, "transfer", "durable", img)
		all, err := s.Daemon.Metrics(t.Context())
		kittest.Check(t, err)
		used := map[string]bool{}
		for _, one := range all[metrics.Prefix+"apply_bytes_total"].GetMetric() {
			used[one.GetLabel()[0].GetValue()] = one.GetCounter().GetValue() > 0
		}
		// Of its layers, others are zstd and not compressed.
		if used["igzip"] != igzip || !used["internal"] {
			t.Errorf("decompressor = %s: %v", setting, used)
		}
	}
}
