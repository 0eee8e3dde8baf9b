package notify

import (
	"context"
	"errors"
	"time"

	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/internal/metrics"
	"github.com/durable-snapshotter/durable-snapshotter/internal/refill"
	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
)

// A blob that could not be fetched is tried again after fetchAgain, then after twice as long
// each time, at most fetchRarely: the layer is reported every minute while a container
// holds it, and a node without a registry must not try as often.
const (
	fetchAgain  = time.Minute
	fetchRarely = time.Hour
)

// pause spaces the attempts at what keeps failing.
type pause struct {
	tried time.Time
	next  time.Duration
}

// fetch has containerd fetch the blob of a damaged layer, and heals it. false without an error
// means that it could not be had.
func (n *Notifier) fetch(ctx context.Context, l repull.Layer, confirm func(context.Context) error) (bool, error) {
	p := n.fetches[l]
	if !n.cfg.Registry || p != nil && time.Since(p.tried) < p.next {
		return false, nil
	}
	err := refill.Fetch(ctx, n.conn.View(), l, refill.FetchOptions{Hosts: n.cfg.Hosts, ContentRoot: n.cfg.ContentRoot, Confirm: confirm})
	if err == nil {
		metrics.Fetches.WithLabelValues(metrics.OK).Inc()
		delete(n.fetches, l)
		log.G(ctx).WithField("event", "blob_fetched").WithField("layer", l.String()).Info("containerd has fetched the blob of a damaged layer")
		return true, n.layers.HealNow(ctx, l.Namespace, l.ChainID.String())
	}
	n.caughtUp = false // containerd may have gone before the name of the fetch was deleted
	var failed *refill.FetchError
	if !errors.As(err, &failed) || ctx.Err() != nil {
		return false, err
	}
	metrics.Fetches.WithLabelValues(metrics.Failed).Inc()
	if p == nil {
		p = &pause{next: fetchAgain / 2}
		n.fetches[l] = p
		log.G(ctx).WithField("event", "fetch_failed").WithField("layer", l.String()).WithError(err).Warn("the blob of a damaged layer could not be fetched")
	}
	p.tried, p.next = time.Now(), min(2*p.next, fetchRarely)
	return false, nil
}

// NotifyOutside queues that a good blob is put back into containerd's content store: the
// layer was healed from it, and it lies elsewhere.
func (n *Notifier) NotifyOutside(namespace, chainID string, b refill.Bytes) {
	if n.cfg.Address == "" || namespace == "" || chainID == "" {
		return
	}
	n.mu.Lock()
	n.outside[n.layer(namespace, chainID)] = b
	n.mu.Unlock()
	n.wakeUp()
}

// putBackAll puts blobs back. What containerd did not accept is retried; what cannot be read
// any more is not.
func (n *Notifier) putBackAll(ctx context.Context) {
	n.mu.Lock()
	queue := n.outside
	n.outside = map[repull.Layer]refill.Bytes{}
	n.mu.Unlock()
	for l, b := range queue {
		put, err := false, n.connect()
		if err == nil {
			put, err = refill.PutBack(ctx, n.conn.View(), l, b)
		}
		if put {
			log.G(ctx).WithField("event", "blob_put_back").WithField("layer", l.String()).Info("the blob of a healed layer is in containerd's content store again")
		}
		var bad *refill.BytesError
		if n.processed(ctx, l, err) || errors.As(err, &bad) {
			continue
		}
		n.mu.Lock()
		if _, newer := n.outside[l]; !newer {
			n.outside[l] = b
		}
		n.mu.Unlock()
	}
}
