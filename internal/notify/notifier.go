// Package notify brings containerd's records in line with what has become of layers: it
// decides when package repull drops images, fetches or puts back blobs, and announces layers
// that are ready again, and it retries what containerd did not accept.
package notify

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/durable-snapshotter/durable-snapshotter/internal/metrics"
	"github.com/durable-snapshotter/durable-snapshotter/internal/refill"
	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
)

// What containerd did not accept is tried again after retryFirst, then after twice as
// long each time, at most retryLast; from the beginning when containerd has returned. At
// its start containerd calls the snapshotter before its own API answers, so the first
// attempt usually fails then.
const (
	retryFirst = time.Second
	retryLast  = 30 * time.Second
)

// Config configures a Notifier.
type Config struct {
	Address     string // of containerd's socket; "": containerd is not notified
	Snapshotter string // the name of this snapshotter in containerd's proxy_plugins
	ContentRoot string // as configured; see Options
	// Registry lets containerd fetch the blob of a damaged layer that is missing or corrupt.
	// Hosts is the directory with its configuration of registries. See refill.Fetch.
	Registry bool
	Hosts    string
	// DropImages lets containerd forget images of which a layer is damaged and its
	// blob is missing or corrupt, so that the next pull is clean. See Containerd.Drop.
	DropImages bool
}

// Layers is what the Notifier needs of the snapshotter.
type Layers interface {
	repull.Rows
	// ConfirmDamaged verifies a layer once more, as deep as its damage was found,
	// and returns nil only when it is damaged and nothing can heal it.
	ConfirmDamaged(ctx context.Context, namespace, chainID string) error
	// HealNow heals a damaged layer for which there is a good blob now, and returns nil when
	// it is ready.
	HealNow(ctx context.Context, namespace, chainID string) error
	// Announced ends the debt of a layer that containerd was refused: until it is
	// called, NotifyReady is called again for the layer after a restart.
	Announced(namespace, chainID string)
}

// Notifier brings containerd's records in line with what has become of layers: it drops
// the damaged ones that cannot be healed, and announces those that are ready again. The
// snapshotter calls the Notify methods, which only add to a queue and return, because
// containerd must not be called from inside its own calls. One goroutine, started by
// Run, processes the queue, and retries what containerd did not accept.
//
// It also does what is due once after a start, see catchUp, and deletes the leases of
// drops when their layers are ready again.
type Notifier struct {
	cfg                 Config
	layers              Layers
	wake                chan struct{}
	returned            chan struct{}                 // containerd can be called again
	pulled              chan struct{}                 // the name of an image was written
	mu                  sync.Mutex                    // guards queue, leased and outside
	queue               map[repull.Layer]bool         // of each layer the latest: true when it is ready, false when it is to be dropped
	leased              map[repull.Layer]bool         // layers that may have a lease of a drop; true: it is to be deleted
	outside             map[repull.Layer]refill.Bytes // layers that were healed from elsewhere, whose blobs are to be put back
	fetches             map[repull.Layer]*pause       // of attempts to fetch what could not be fetched; used by Run's goroutine only
	collected, caughtUp bool                          // what catchUp has done; used by Run's goroutine only
	logged              map[repull.Layer]string       // the last error of each in the log; used by Run's goroutine only
	conn                *repull.Containerd            // used by Run's goroutine only
	stop                context.CancelFunc
	ended               sync.WaitGroup
}

// New returns a Notifier that only queues until Run is called.
func New(cfg Config) *Notifier {
	return &Notifier{
		cfg: cfg, wake: make(chan struct{}, 1), returned: make(chan struct{}, 1), pulled: make(chan struct{}, 1), caughtUp: cfg.Address == "",
		queue: map[repull.Layer]bool{}, leased: map[repull.Layer]bool{}, logged: map[repull.Layer]string{},
		outside: map[repull.Layer]refill.Bytes{}, fetches: map[repull.Layer]*pause{},
	}
}

func (n *Notifier) layer(namespace, chainID string) repull.Layer {
	return repull.Layer{Namespace: namespace, Snapshotter: n.cfg.Snapshotter, ChainID: digest.Digest(chainID)}
}

// NotifyDamaged queues the mending of a layer that could not be healed because there is no
// good blob of it on this node: its blob is fetched, or, when that is not possible, it is
// dropped. name is the snapshotter's own, <namespace>/<number>/<key>. Images use
// the snapshot whose key is the chain ID; any other, such as BuildKit's, is left to the
// client that made it.
func (n *Notifier) NotifyDamaged(name, namespace, chainID string) {
	if (n.cfg.DropImages || n.cfg.Registry) && chainID != "" && strings.HasSuffix(name, "/"+chainID) {
		n.enqueue(namespace, chainID, false)
	}
}

// NotifyReady queues the announcement of a layer that is ready after a caller was
// refused it.
func (n *Notifier) NotifyReady(namespace, chainID string) {
	n.enqueue(namespace, chainID, true)
	n.NotifyCommitted(namespace, chainID)
}

// NotifyCommitted marks the lease of a drop of the layer for deletion, because the layer
// is ready. containerd may hold its locks during this call, so Run's goroutine deletes
// the lease later.
func (n *Notifier) NotifyCommitted(namespace, name string) {
	l := n.layer(namespace, name)
	n.mu.Lock()
	_, due := n.leased[l]
	if due {
		n.leased[l] = true
	}
	n.mu.Unlock()
	if due {
		n.wakeUp()
	}
}

func (n *Notifier) enqueue(namespace, chainID string, ready bool) {
	if n.cfg.Address == "" || namespace == "" || chainID == "" {
		return // not a layer of an image of containerd's
	}
	n.mu.Lock()
	n.queue[n.layer(namespace, chainID)] = ready
	n.mu.Unlock()
	n.wakeUp()
}

func (n *Notifier) wakeUp() { signal(n.wake) }

// signal leaves one message in a channel that has room for one.
func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Run starts to process the queue, and returns. Processing ends with ctx, or with Close.
func (n *Notifier) Run(ctx context.Context, l Layers) {
	n.layers = l
	ctx, n.stop = context.WithCancel(ctx)
	n.ended.Go(func() {
		if n.cfg.Address != "" && n.connect() == nil {
			n.ended.Go(func() {
				n.conn.Watch(ctx, func(connected bool) {
					metrics.Set(metrics.ContainerdReachable, connected)
					if connected {
						signal(n.returned)
					}
				})
			})
			n.ended.Go(func() { n.conn.WatchImages(ctx, func() { signal(n.pulled) }) })
		}
		pause := retryFirst
		for {
			var retry <-chan time.Time
			if n.pending() {
				retry = time.After(pause)
				pause = min(2*pause, retryLast)
			} else {
				pause = retryFirst
			}
			select {
			case <-ctx.Done():
				return
			case <-n.wake:
			case <-n.returned:
				pause = retryFirst
				n.sweep(ctx) // it may have gone before a name was deleted
			case <-n.pulled:
				n.sweep(ctx)
				continue
			case <-retry:
			}
			n.notifyAll(ctx)
			n.putBackAll(ctx)
			n.release(ctx)
		}
	})
}

// pending reports whether anything is left to process or to retry.
func (n *Notifier) pending() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return !n.caughtUp || len(n.queue)+len(n.outside) > 0 || slices.Contains(slices.Collect(maps.Values(n.leased)), true)
}

// Close waits until the processing has ended, and closes the connection. What is still
// queued is discarded: the snapshotter reports it again after a restart.
func (n *Notifier) Close() error {
	n.stop()
	n.ended.Wait()
	if n.conn == nil {
		return nil
	}
	return n.conn.Close()
}

// notifyAll processes the queue. What containerd did not accept is queued again. A
// damaged layer that must not be dropped is not retried here, because the snapshotter
// reports it every minute.
func (n *Notifier) notifyAll(ctx context.Context) {
	n.mu.Lock()
	queue := n.queue
	n.queue = map[repull.Layer]bool{}
	n.mu.Unlock()
	var ready []repull.Layer
	for l, isReady := range queue {
		if isReady {
			ready = append(ready, l)
			continue
		}
		if err := n.drop(ctx, l); !n.processed(ctx, l, err) {
			n.requeue(l, false)
		}
		if ctx.Err() != nil {
			return
		}
	}
	if len(ready) == 0 {
		return
	}
	// All at once: the content store is read once for all of them.
	err := n.announce(ctx, ready)
	for _, l := range ready {
		if !n.processed(ctx, l, err) {
			n.requeue(l, true)
		}
	}
}

// processed logs the error of a layer's notification, each error once, and reports
// whether the notification is done with; false means that it must be retried.
func (n *Notifier) processed(ctx context.Context, l repull.Layer, err error) bool {
	if err == nil {
		delete(n.logged, l)
		return true
	}
	if ctx.Err() != nil {
		return true
	}
	if text := err.Error(); n.logged[l] != text {
		n.logged[l] = text
		log.G(ctx).WithField("event", "notify_failed").WithError(err).WithField("layer", l.String()).Warn("containerd was not notified of a layer")
	}
	var held *repull.HeldError
	var good *repull.GoodBlobError
	var unknown *repull.UnknownBlobError
	return errors.As(err, &held) || errors.As(err, &good) || errors.As(err, &unknown) || errors.Is(err, errNotConfirmed)
}

// requeue queues a notification again, unless a newer one of the layer was queued
// meanwhile.
func (n *Notifier) requeue(l repull.Layer, ready bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, newer := n.queue[l]; !newer {
		n.queue[l] = ready
	}
}

// errNotConfirmed is wrapped when a second verification does not confirm that a layer
// is to be dropped.
var errNotConfirmed = errors.New("nothing is dropped")

func (n *Notifier) connect() (err error) {
	if n.conn == nil {
		n.conn, err = repull.Connect(n.cfg.Address)
	}
	return err
}

func (n *Notifier) announce(ctx context.Context, ready []repull.Layer) error {
	if err := n.connect(); err != nil {
		return err
	}
	names, err := n.conn.Announce(ctx, ready)
	if len(names) > 0 {
		log.G(ctx).WithField("event", "images_ready").WithField("layers", len(ready)).WithField("images", names).
			Info("images are ready again, and containerd was notified")
	}
	if err != nil {
		return err
	}
	for _, l := range ready {
		n.layers.Announced(l.Namespace, l.ChainID.String())
	}
	return nil
}

func (n *Notifier) drop(ctx context.Context, l repull.Layer) error {
	if err := n.connect(); err != nil {
		return err
	}
	confirm := func(ctx context.Context) error {
		if err := n.layers.ConfirmDamaged(ctx, l.Namespace, l.ChainID.String()); err != nil {
			return fmt.Errorf("%w: %w", errNotConfirmed, err)
		}
		return nil
	}
	if fetched, err := n.fetch(ctx, l, confirm); fetched || err != nil || !n.cfg.DropImages {
		return err
	}
	n.mu.Lock()
	due := n.leased[l]
	n.leased[l] = false // a Commit from now on ends it
	n.mu.Unlock()
	done, err := n.conn.Drop(ctx, l, repull.Options{
		Rows: n.layers, ContentRoot: n.cfg.ContentRoot, BlobsOfHeld: true, Confirm: confirm,
	})
	if due && done.Nothing() {
		// A Commit has called before this drop, and containerd had not recorded it yet:
		// the lease of an earlier drop, which has failed, is due still.
		n.mu.Lock()
		n.leased[l] = true
		n.mu.Unlock()
	}
	if !done.Nothing() {
		metrics.Drops.Inc()
		metrics.ImagesDropped.Add(float64(len(done.Images)))
		log.G(ctx).WithField("event", "layer_dropped").WithField("layer", l.String()).Warn("a damaged layer without a good blob: " + done.String())
	}
	return err
}

// release deletes the leases of layers that are ready again, and does what catchUp has
// not done yet. What fails is retried.
func (n *Notifier) release(ctx context.Context) {
	if err := n.connect(); err != nil || ctx.Err() != nil {
		return
	}
	if !n.caughtUp {
		err := n.catchUp(ctx)
		if n.caughtUp = err == nil; err != nil {
			log.G(ctx).WithError(err).Debug("what is due after a start is not done yet")
		}
	}
	n.mu.Lock()
	due := slices.Collect(maps.Keys(n.leased))
	due = slices.DeleteFunc(due, func(l repull.Layer) bool { return !n.leased[l] })
	n.mu.Unlock()
	for _, l := range due {
		if err := n.conn.Release(ctx, l); err != nil {
			log.G(ctx).WithError(err).WithField("layer", l.String()).Debug("the lease of a drop is not deleted yet")
			return
		}
		n.forgetLease(l)
	}
}

// sweep is releasePulled where nothing waits for it.
func (n *Notifier) sweep(ctx context.Context) {
	if err := n.releasePulled(ctx); err != nil && ctx.Err() == nil {
		log.G(ctx).WithError(err).Debug("what repairs and fetches have left is not deleted yet")
	}
}

// releasePulled deletes the leases of images that are back, and the names of fetches whose
// client has gone. What fails is done with the next image, or when containerd has returned.
func (n *Notifier) releasePulled(ctx context.Context) error {
	return errors.Join(n.conn.ReleasePulled(ctx, n.cfg.Snapshotter), refill.Sweep(ctx, n.conn.View()))
}

// forgetLease removes a deleted lease from leased, unless another drop of the layer has
// begun.
func (n *Notifier) forgetLease(l repull.Layer) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.leased[l] {
		delete(n.leased, l)
	}
}

// catchUp has containerd collect, once after a start of the daemon, what it could not
// delete while the daemon was down, and deletes leases that a drop has left for layers
// that are ready by now, and names that a fetch has left. It is repeated after a fetch that
// has failed.
//
// The leases are noted first. containerd collects only when no Commit is in flight, so a
// layer that was committed before they were noted is ready after the collection, and of
// any later Commit there is a call of NotifyCommitted.
func (n *Notifier) catchUp(ctx context.Context) error {
	leased, err := n.conn.Leased(ctx, n.cfg.Snapshotter)
	if err != nil {
		return err
	}
	n.mu.Lock()
	for _, l := range leased {
		if _, known := n.leased[l]; !known {
			n.leased[l] = false
		}
	}
	n.mu.Unlock()
	if err := n.releasePulled(ctx); err != nil {
		return err
	}
	if !n.collected {
		skipped, err := n.conn.CollectMissed(ctx, n.cfg.Snapshotter, n.layers)
		if err != nil {
			return err
		}
		n.collected = true
		if skipped == "" {
			log.G(ctx).Info("containerd has collected what it could not delete while this daemon was down")
		} else {
			log.G(ctx).WithField("reason", skipped).Info("no collection was started of what containerd could not delete while this daemon was down")
		}
	}
	for _, l := range leased {
		ready, err := n.conn.Ready(ctx, l)
		if err != nil {
			return err
		}
		if ready {
			n.NotifyCommitted(l.Namespace, l.ChainID.String())
		}
	}
	return nil
}
