package full

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
)

// orderly pulls, removes and collects images in an order that the seed gives.
// It begins with all images and ends with all of them.
func (w *worker) orderly(ctx context.Context) error {
	random := rand.New(rand.NewPCG(w.setup.Seed, 0x0de7))
	images := w.bench.images
	there := make([]bool, len(images))
	container := map[string]bool{} // keys of containers

	get := func(i int) error {
		there[i] = true
		return w.pull(ctx, images[i].Ref)
	}
	order := random.Perm(len(images))
	if err := get(order[0]); err != nil {
		return err
	}
	if err := w.node.container(ctx, "container-first", images[order[0]].Top()); err != nil {
		return err
	}
	container["container-first"] = true
	// Two clients at once: their images share layers, and the journal of the
	// file system is shared by all processes.
	if err := w.both(ctx, images[order[1]].Ref, images[order[2]].Ref); err != nil {
		return err
	}
	there[order[1]], there[order[2]] = true, true
	if err := get(order[3]); err != nil {
		return err
	}

	for round := range w.setup.Rounds {
		i := random.IntN(len(images))
		switch {
		case !there[i]:
			if err := get(i); err != nil {
				return err
			}
			key := fmt.Sprintf("container-%d", round)
			if err := w.node.container(ctx, key, images[i].Top()); err != nil {
				return err
			}
			container[key] = true
		case random.IntN(4) == 0:
			if err := w.node.prune(ctx); err != nil {
				return err
			}
		default:
			// Without its containers: now and then the layers of an image
			// outlive it.
			if random.IntN(2) == 0 {
				for key := range container {
					if err := w.node.uncontainer(ctx, key); err != nil {
						return err
					}
				}
				clear(container)
			}
			there[i] = false
			if err := w.remove(ctx, images[i].Ref); err != nil {
				return err
			}
		}
	}
	for i := range images {
		if !there[i] {
			if err := get(i); err != nil {
				return err
			}
		}
	}
	return nil
}

// both pulls two images side by side.
func (w *worker) both(ctx context.Context, refs ...string) error {
	var pulling sync.WaitGroup
	errs := make([]error, len(refs))
	for i, ref := range refs {
		pulling.Go(func() { errs[i] = w.pull(ctx, ref) })
	}
	pulling.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
