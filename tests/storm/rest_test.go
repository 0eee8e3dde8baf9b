package storm

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// fetchedPrefix begins the names under which the daemon has containerd fetch, see
// internal/repull: they are deleted at once.
const fetchedPrefix = "durable-snapshotter.invalid/"

// mendLimit is how long the daemon may take until everything that was damaged is
// healed, or dropped: it tries again every ten seconds.
const mendLimit = 3 * time.Minute

// rest verifies what must be true of the node when no actor does anything.
func (s *storm) rest(ctx context.Context) {
	s.ledger.printf("rest")
	if s.damaged.Swap(false) {
		// Under a container a layer without a good blob stays as it is, for ever.
		if err := s.endPods(ctx); err != nil {
			s.violate("container", "%v", err)
		}
		if err := s.mend(ctx); err != nil {
			s.violate("mend", "%v", err)
			return
		}
	}
	if err := s.restoreBlobs(); err != nil {
		s.violate("storm", "the storm itself: %v", err)
	}
	s.ledger.settled()
	var both sync.WaitGroup
	for i, namespace := range []string{plain, k8s} {
		rng := s.random(100 + i)
		both.Go(func() {
			for _, img := range s.images {
				way := kit.Ways[rng.IntN(map[string]int{plain: 2, k8s: 3}[namespace])]
				s.ledger.printf("rest: %s", s.try(ctx, way, namespace, img, false))
				s.sameTree(ctx, namespace, img)
			}
		})
	}
	both.Wait()
	s.final += 2 * len(s.images)
	if s.over() {
		return // the lists lack what was not pulled
	}
	if s.round%unload == 0 {
		s.unlease(ctx)
	}
	s.listable(ctx)
	if s.node.Daemon != nil {
		s.whole(ctx)
		s.measure(ctx)
		if n, err := s.orphans(ctx); err != nil {
			s.violate("lists", "%v", err)
		} else {
			s.orphaned = max(s.orphaned, n)
		}
	}
}

// sameTree mounts an image as a container would, and compares it with its tars.
func (s *storm) sameTree(ctx context.Context, namespace string, img stormImage) {
	s.node.onDisk.RLock()
	defer s.node.onDisk.RUnlock()
	tree, links, err := s.node.get().View(ctx, namespace, img.Top())
	if err != nil {
		s.violate("view", "%s %s: %v", namespace, img.name, err)
		return
	}
	if text := kit.SameView(img.tree, img.links, tree, links); text != "" {
		s.violate("tree", "%s %s differs from its tars:\n%s", namespace, img.name, text)
	}
}

// mend waits until no layer is damaged: the daemon heals it, or drops its images. What
// has not been verified is found by a repair, as by an operator who suspects damage.
func (s *storm) mend(ctx context.Context) error {
	out, code, err := s.node.verb(ctx, "repair", "--deep", "--apply")
	s.ledger.printf("repair --deep --apply: exit %d, %v\n%s", code, err, out)
	if err != nil {
		return err
	}
	for deadline := time.Now().Add(mendLimit); ; time.Sleep(200 * time.Millisecond) {
		if err := s.collectAll(ctx); err != nil {
			return fmt.Errorf("collect: %w", err)
		}
		found, err := s.node.Daemon.Inspect(ctx)
		if err != nil {
			return err
		}
		bad := slices.DeleteFunc(found.Layers, func(l kit.Verdict) bool { return l.State == "ready" })
		if len(bad) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("after %v these are neither healed nor dropped: %+v", mendLimit, bad)
		}
	}
}

// collectAll has containerd collect what it does not know any more, too: it calls the
// snapshotter for that only after something was removed.
func (s *storm) collectAll(ctx context.Context) error {
	in := namespaces.WithNamespace(ctx, standing)
	_, err := s.node.snapshotter().Prepare(in, "to be removed", "")
	if err == nil {
		err = s.node.snapshotter().Remove(in, "to be removed")
	}
	if err == nil || errdefs.IsNotFound(err) { // another collection has come first
		err = s.collect(ctx, standing)
	}
	return err
}

// unlease deletes all leases: no actor is at work, so that they are those of clients
// that were killed. It would take a day without. A daemon that has just started has
// one for a moment, with which it has containerd collect, and may delete it first.
func (s *storm) unlease(ctx context.Context) {
	for _, namespace := range []string{plain, k8s} {
		in := namespaces.WithNamespace(ctx, namespace)
		all, err := s.node.client().LeasesService().List(in)
		if err != nil {
			s.violate("lists", "leases of %s: %v", namespace, err)
		}
		for _, l := range all {
			if err := s.node.client().LeasesService().Delete(in, l, leases.SynchronousDelete); err != nil && !errdefs.IsNotFound(err) {
				s.violate("lists", "delete lease %s of %s: %v", l.ID, namespace, err)
			}
		}
	}
}

// listable queries all that people and the kubelet list.
func (s *storm) listable(ctx context.Context) {
	for _, namespace := range []string{plain, k8s} {
		in := namespaces.WithNamespace(ctx, namespace)
		if err := s.node.snapshotter().Walk(in, func(context.Context, snapshots.Info) error { return nil }); err != nil {
			s.violate("lists", "snapshots of %s: %v", namespace, err)
		}
		listed, err := s.node.client().ImageService().List(in)
		if err != nil {
			s.violate("lists", "images of %s: %v", namespace, err)
		}
		for _, img := range s.images {
			if !slices.ContainsFunc(listed, func(i image) bool { return i.Name == img.Ref }) {
				s.violate("lists", "%s does not list %s after its pull", namespace, img.name)
			}
		}
		for _, i := range listed {
			if strings.HasPrefix(i.Name, fetchedPrefix) {
				s.violate("lists", "%s lists %s, which is left of a fetch", namespace, i.Name)
			}
		}
	}
	cri := s.node.get().CRI
	for _, img := range s.images {
		if err := cri.WaitKnown(ctx, img.Ref, true); err != nil {
			s.violate("lists", "CRI: %v", err)
		}
	}
	if _, err := cri.Images.ListImages(ctx, &runtimeapi.ListImagesRequest{}); err != nil {
		s.violate("lists", "CRI images: %v", err)
	}
	if _, err := cri.Images.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{}); err != nil {
		s.violate("lists", "CRI image file system: %v", err)
	}
}

// whole has check --deep find nothing, and check --images no image that is not ready.
func (s *storm) whole(ctx context.Context) {
	if out, code, err := s.node.verb(ctx, "check", "--images"); err != nil || code != 0 {
		s.violate("images", "check --images: exit %d, %v: %s", code, err, out)
	}
	out, code, err := s.node.verb(ctx, "check", "--deep", "--json")
	if err == nil && code == 0 {
		return
	}
	text := out
	var all []kit.Verdict
	if json.Unmarshal([]byte(out), &all) == nil {
		all = slices.DeleteFunc(all, func(l kit.Verdict) bool { return l.State == "ready" })
		text = fmt.Sprintf("%+v", all)
	}
	s.violate("check", "check --deep: exit %d, %v: %s", code, err, text)
}

// readBlobs reads the good content of the images' layers from the registry's disk.
func readBlobs(r *kit.Registry, all []stormImage) (map[digest.Digest][]byte, error) {
	blobs := map[digest.Digest][]byte{}
	for _, img := range all {
		for _, l := range img.Layers {
			body, err := os.ReadFile(r.Blob(l.Digest))
			if err != nil {
				return nil, fmt.Errorf("blob of %s: %w", img.name, err)
			}
			blobs[l.Digest] = body
		}
	}
	return blobs, nil
}

// orphans counts the committed rows of the daemon that containerd does not know.
func (s *storm) orphans(ctx context.Context) (int, error) {
	known := map[string]int{}
	for _, namespace := range []string{plain, k8s} {
		err := s.node.snapshotter().Walk(namespaces.WithNamespace(ctx, namespace), func(_ context.Context, i snapshots.Info) error {
			if i.Kind == snapshots.KindCommitted {
				known[namespace+" "+i.Name]++
			}
			return nil
		})
		if err != nil {
			return 0, err
		}
	}
	found, err := s.node.Daemon.Inspect(ctx)
	n := 0
	for _, l := range found.Layers {
		part := strings.SplitN(l.Name, "/", 3)
		if key := part[0] + " " + part[len(part)-1]; known[key] > 0 {
			known[key]--
		} else {
			n++
		}
	}
	return n, err
}
