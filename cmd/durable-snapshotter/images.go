package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/durable-snapshotter/durable-snapshotter/images"
	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// What could not be told to containerd is tried again after retryFirst, then
// after twice as long each time, at most retryLast. It asks about layers before
// its own API answers, so the first failure is the usual one at its start.
const (
	retryFirst = time.Second
	retryLast  = 30 * time.Second
)

// messenger tells containerd what has become of layers. The snapshotter hands it
// the news and goes on: containerd must not be called from inside its own calls.
type messenger struct {
	cfg   Config
	rows  images.Rows
	wake  chan struct{}
	mu    sync.Mutex              // guards news
	news  map[images.Layer]bool   // of each layer the last: it is ready, or lost
	said  map[images.Layer]string // the last error of each in the log; of run only
	conn  *images.Containerd      // of run only
	stop  context.CancelFunc
	ended sync.WaitGroup
}

func newMessenger(cfg Config) *messenger {
	return &messenger{cfg: cfg, wake: make(chan struct{}, 1), news: map[images.Layer]bool{}, said: map[images.Layer]string{}}
}

// lost hears of a layer that could not be healed.
func (m *messenger) lost(e *snapshotter.DamagedError) {
	if e.NoBlob && m.cfg.Containerd.DropImages {
		m.add(e.Namespace, e.ChainID, false)
	}
}

// ready hears of a layer that is ready after somebody was refused it.
func (m *messenger) ready(e storage.CommitEntry) { m.add(e.Namespace, e.ChainID, true) }

func (m *messenger) add(namespace, chainID string, ready bool) {
	if m.cfg.Containerd.Address == "" || namespace == "" || chainID == "" {
		return // not a layer of an image of containerd's
	}
	l := images.Layer{Namespace: namespace, Snapshotter: m.cfg.Containerd.Snapshotter, ChainID: digest.Digest(chainID)}
	m.mu.Lock()
	m.news[l] = ready
	m.mu.Unlock()
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// run tells the news until ctx ends, or close is called.
func (m *messenger) run(ctx context.Context, rows images.Rows) {
	m.rows = rows
	ctx, m.stop = context.WithCancel(ctx)
	m.ended.Go(func() {
		pause := retryFirst
		for {
			var retry <-chan time.Time
			if m.open() {
				retry = time.After(pause)
				pause = min(2*pause, retryLast)
			} else {
				pause = retryFirst
			}
			select {
			case <-ctx.Done():
				return
			case <-m.wake:
			case <-retry:
			}
			m.tellAll(ctx)
		}
	})
}

// open reports whether there is something that was not told yet.
func (m *messenger) open() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.news) > 0
}

// close ends run and the connection.
func (m *messenger) close() error {
	m.stop()
	m.ended.Wait()
	if m.conn == nil {
		return nil
	}
	return m.conn.Close()
}

// tellAll keeps the news that containerd did not take for the next time. What
// containers hold is not tried again here: the snapshotter speaks of it every
// minute.
func (m *messenger) tellAll(ctx context.Context) {
	m.mu.Lock()
	news := m.news
	m.news = map[images.Layer]bool{}
	m.mu.Unlock()
	for l, ready := range news {
		err := m.tell(ctx, l, ready)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			delete(m.said, l)
			continue
		}
		if text := err.Error(); m.said[l] != text {
			m.said[l] = text
			log.G(ctx).WithError(err).WithField("layer", l.String()).Warn("containerd was not told of a layer")
		}
		if held := (*images.HeldError)(nil); errors.As(err, &held) || errors.Is(err, errNoStore) {
			continue
		}
		m.mu.Lock()
		if _, newer := m.news[l]; !newer {
			m.news[l] = ready
		}
		m.mu.Unlock()
	}
}

// errNoStore keeps images from being dropped because of a wrong content_root:
// their blobs may be well.
var errNoStore = errors.New("content_root is not a content store of containerd: nothing can be healed, and nothing is dropped; correct it in the configuration")

func (m *messenger) tell(ctx context.Context, l images.Layer, ready bool) (err error) {
	if m.conn == nil {
		if m.conn, err = images.Connect(m.cfg.Containerd.Address); err != nil {
			return err
		}
	}
	if ready {
		names, err := m.conn.Announce(ctx, l)
		if len(names) > 0 {
			log.G(ctx).WithField("layer", l.String()).WithField("images", names).Info("images are ready again, and containerd was told")
		}
		return err
	}
	if _, err := os.Stat(filepath.Join(m.cfg.ContentRoot, "blobs")); err != nil {
		return errors.Join(errNoStore, err)
	}
	done, err := m.conn.Drop(ctx, l, images.Options{Rows: m.rows, ContentRoot: m.cfg.ContentRoot, BlobsOfHeld: true})
	if !done.Nothing() {
		log.G(ctx).WithField("layer", l.String()).Warn("a damaged layer without a good blob: " + done.String())
	}
	return err
}
