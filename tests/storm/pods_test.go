package storm

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// podsAtMost bounds the pods of a node.
const podsAtMost = 4

// pod is a sandbox with one container, which runs.
type pod struct {
	*kit.Pod
	image     stormImage
	container string // "" when its last start, or its removal, has failed
	ended     int    // node.ended when it was started: afterwards it does not run any more
}

// countEnd notes that all containers are about to be ended from outside.
func (n *node) countEnd() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ended++
}

// takePod returns a pod that no other actor is at work on, as containerd is reached now; nil
// when a new one is to be made.
func (n *node) takePod(rng *rand.Rand) *pod {
	n.mu.Lock()
	defer n.mu.Unlock()
	i := rng.IntN(podsAtMost)
	if i >= len(n.pods) {
		return nil
	}
	p := n.pods[i]
	n.pods = slices.Delete(n.pods, i, i+1)
	p.Pod = p.Via(n.puller.CRI)
	return p
}

// givePod returns a pod to the others.
func (n *node) givePod(p *pod) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.pods = append(n.pods, p)
}

// outlives reports whether a pod's container is to run still.
func (n *node) outlives(p *pod) bool {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return p.ended == n.ended
}

// actContainer does what the kubelet does with pods: it makes and starts one, or has the
// container of one that runs end, start again, or go with its sandbox. Unless something has
// disturbed the images, all of it must succeed, and a container runs until it is stopped.
func (s *storm) actContainer(ctx context.Context, rng *rand.Rand) (string, error) {
	from := time.Now()
	img := named(s.images, []string{pause, runs}[rng.IntN(2)])
	p, what := s.node.takePod(rng), rng.IntN(3)
	var did string
	var err error
	switch {
	case p == nil:
		did = "start a pod of " + img.name
		err = s.startPod(ctx, img)
	case what == 0:
		did, img = "remove pod "+p.ID, p.image
		// If that fails, the sandbox may be gone, or not: whatever is left goes at rest.
		err = p.Remove(ctx)
	case what == 1:
		did, img = "restart the container of pod "+p.ID, p.image
		err = s.restart(ctx, p)
		s.node.givePod(p)
	default:
		did, img = "does the container of pod "+p.ID+" run", p.image
		err = s.runs(ctx, p)
		s.node.givePod(p)
	}
	text := fmt.Sprintf("%s in %v", did, time.Since(from).Round(time.Millisecond))
	if err == nil {
		return text + ": ok", nil
	}
	text += ": " + strings.ReplaceAll(err.Error(), "\n", " ")
	for _, ref := range []string{img.Ref, named(s.images, pause).Ref} {
		if excuse := s.ledger.excuseOfPod(k8s, ref, from); excuse != "" {
			time.Sleep(50 * time.Millisecond)
			return text + " (excused: " + excuse + ")", nil
		}
	}
	s.violate("container", "%s", text)
	return text, nil
}

// startPod pulls an image, if it is not known, and runs a container of it. The sandbox
// of one that does not run is removed, or else at rest.
func (s *storm) startPod(ctx context.Context, img stormImage) (err error) {
	cri := s.node.get().CRI
	s.node.mu.RLock()
	p := &pod{image: img, ended: s.node.ended}
	s.node.mu.RUnlock()
	if err := s.ensure(ctx, named(s.images, pause).Ref, img.Ref); err != nil {
		return err
	}
	if p.Pod, err = cri.StartPod(ctx); err != nil {
		return err
	}
	if err := s.startContainer(ctx, p); err != nil {
		_ = p.Remove(ctx)
		return err
	}
	s.pods.Add(1)
	s.node.givePod(p)
	return nil
}

// ensure pulls those of images that are not known.
func (s *storm) ensure(ctx context.Context, refs ...string) error {
	cri := s.node.get().CRI
	for _, ref := range refs {
		known, err := cri.Known(ctx, ref)
		if err == nil && known {
			// CRI's own list learns later of a name that another client has deleted.
			_, err = s.node.client().ImageService().Get(namespaces.WithNamespace(ctx, k8s), ref)
			known = !errdefs.IsNotFound(err)
		}
		if err != nil || !known {
			if err := cri.Pull(ctx, ref); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *storm) startContainer(ctx context.Context, p *pod) error {
	id, err := p.Create(ctx, p.image.Ref, "/bin/guest", "wait")
	if err != nil {
		return err
	}
	if err := p.Start(ctx, id); err != nil {
		return err
	}
	p.container = id
	return nil
}

// restart stops and removes the container of a pod, and starts another one.
func (s *storm) restart(ctx context.Context, p *pod) error {
	if !s.node.outlives(p) {
		return nil // its sandbox is gone, too
	}
	if err := s.ensure(ctx, p.image.Ref); err != nil { // as the kubelet does
		return err
	}
	id := p.container
	p.container = ""
	if id != "" {
		if err := p.StopContainer(ctx, id); err != nil {
			return err
		}
		if err := p.RemoveContainer(ctx, id); err != nil {
			return err
		}
	}
	return s.startContainer(ctx, p)
}

// runs is an error when the container of a pod does not run.
func (s *storm) runs(ctx context.Context, p *pod) error {
	if p.container == "" || !s.node.outlives(p) {
		return nil
	}
	running, err := p.Running(ctx, p.container)
	if err == nil && !running && s.node.outlives(p) {
		err = fmt.Errorf("container %s does not run", p.container)
	}
	return err
}

// endPods removes all pods, also those that power cuts have ended, or whose start was cut short.
func (s *storm) endPods(ctx context.Context) error {
	if !s.has("container") {
		return nil
	}
	s.node.mu.Lock()
	s.node.pods = nil
	s.node.mu.Unlock()
	if err := s.node.get().CRI.RemovePods(ctx); err != nil {
		return fmt.Errorf("remove all pods: %w", err)
	}
	// A sandbox that a kill has cut short may be in containerd's records only; the CRI plugin
	// does not load one whose own record is not complete.
	in := namespaces.WithNamespace(ctx, k8s)
	left, err := s.node.client().ContainerService().List(in)
	for _, c := range left {
		s.ledger.printf("container %s is left", c.ID)
		err = errors.Join(err, s.node.client().ContainerService().Delete(in, c.ID))
	}
	return err
}
