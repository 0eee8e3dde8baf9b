package commit

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// worker calls a daemon at random, one call at a time, and keeps a model of what
// must exist.
type worker struct {
	*crew
	number  int
	sn      snapshots.Snapshotter
	random  *rand.Rand
	have    map[string]*thing // by key or name
	made    int               // for names that are new
	calls   int
	pending *pending
	wrong   []error
}

// thing is one snapshot of the model.
type thing struct {
	kind    snapshots.Kind
	parent  string
	content string
}

// pending is a call that was not answered. It has happened when the daemon knows
// the name that it makes appear, or does not know the one that it makes vanish.
type pending struct {
	shows   string
	appears bool
	done    func() // carries it into the model
}

// work goes on until ctx ends; a call that has begun is ended.
func (w *worker) work(ctx context.Context) {
	for ctx.Err() == nil && len(w.wrong) == 0 && w.pending == nil {
		w.calls++
		switch n := w.random.IntN(100); {
		case n < 30:
			w.prepare()
		case n < 55:
			w.commit()
		case n < 63:
			w.view()
		case n < 83:
			w.remove()
		case n < 88:
			w.removeParent()
		case n < 95:
			w.query()
		case n < 98:
			w.label()
		default:
			w.sweep()
		}
	}
}

// call makes a call in time and reports whether it succeeded. Any error but the
// allowed ones, and that of a daemon that was killed, is wrong.
func (w *worker) call(what string, p *pending, do func(context.Context) error, allowed ...func(error) bool) bool {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	err := do(ctx)
	if err == nil {
		return true
	}
	for _, ok := range allowed {
		if ok(err) {
			return false
		}
	}
	if errdefs.IsUnavailable(err) {
		// Whether the daemon was killed is seen by the goroutine that waits for it.
		select {
		case <-w.daemon.Done():
			if w.pending = p; p == nil {
				w.pending = &pending{} // it was only a query
			}
			return false
		case <-time.After(time.Minute):
		}
	}
	w.wrong = append(w.wrong, fmt.Errorf("%s: %w", what, err))
	return false
}

// pick returns one of the worker's snapshots of a kind, or nothing.
func (w *worker) pick(kind snapshots.Kind) string {
	var names []string
	for name, s := range w.have {
		if s.kind == kind {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return ""
	}
	return names[w.random.IntN(len(names))]
}

func (w *worker) children(name string) (n int) {
	for _, s := range w.have {
		if s.parent == name {
			n++
		}
	}
	return n
}

func (w *worker) newName(what string) string {
	w.made++
	return fmt.Sprintf("default/%d/%s-%d", w.made, what, w.number)
}

// most is how many snapshots a worker has at once.
const most = 8

func (w *worker) prepare() {
	if len(w.have) >= most {
		w.remove()
		return
	}
	key, s := w.newName("active"), &thing{kind: snapshots.KindActive, parent: w.pick(snapshots.KindCommitted)}
	add := func() { w.have[key] = s }
	var dir string
	if !w.call("prepare", &pending{key, true, add}, func(ctx context.Context) error {
		m, err := w.sn.Prepare(ctx, key, s.parent)
		if err == nil {
			dir, err = upperOf(m)
		}
		return err
	}) {
		return
	}
	add()
	s.content = fmt.Sprintf("%s on %q", key, s.parent)
	if err := os.WriteFile(filepath.Join(dir, "content"), []byte(s.content), 0o644); err != nil {
		w.wrong = append(w.wrong, err)
	}
	for i := range w.random.IntN(20) {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("file-", i)), make([]byte, w.random.IntN(20_000)), 0o644); err != nil {
			w.wrong = append(w.wrong, err)
		}
	}
}

// commit gives an active snapshot a name of its own, or one that others want too.
func (w *worker) commit() {
	key := w.pick(snapshots.KindActive)
	if key == "" {
		w.prepare()
		return
	}
	name, shared := w.newName("committed"), w.random.IntN(4) == 0
	if shared {
		name = fmt.Sprintf("default/0/shared-%d", w.random.IntN(3000))
	}
	s := w.have[key]
	done := func() {
		delete(w.have, key)
		w.have[name] = &thing{kind: snapshots.KindCommitted, parent: s.parent, content: s.content}
	}
	// Whether it has happened shows in the key: the name may be another's.
	if !w.call("commit", &pending{key, false, done}, func(ctx context.Context) error { return w.sn.Commit(ctx, name, key) },
		func(err error) bool { return shared && errdefs.IsAlreadyExists(err) }) {
		return
	}
	done()
	if shared {
		w.mu.Lock()
		defer w.mu.Unlock()
		if other := w.took[name]; other != nil {
			w.wrong = append(w.wrong, fmt.Errorf("%s was committed by worker %d before", name, other.number))
		}
		w.took[name] = w
	}
}

func (w *worker) view() {
	parent := w.pick(snapshots.KindCommitted)
	if parent == "" || len(w.have) >= most {
		w.commit()
		return
	}
	key := w.newName("view")
	add := func() { w.have[key] = &thing{kind: snapshots.KindView, parent: parent} }
	if w.call("view", &pending{key, true, add}, func(ctx context.Context) error {
		_, err := w.sn.View(ctx, key, parent)
		return err
	}) {
		add()
	}
}

// remove takes any snapshot without children, but no name that others may have
// wanted: it would be free again.
func (w *worker) remove() {
	for name := range w.have {
		if w.children(name) > 0 || w.isShared(name) {
			continue
		}
		done := func() { delete(w.have, name) }
		if w.call("remove", &pending{name, false, done}, func(ctx context.Context) error { return w.sn.Remove(ctx, name) }) {
			done()
		}
		return
	}
}

func (w *worker) isShared(name string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.took[name] != nil
}

// removeParent must be refused.
func (w *worker) removeParent() {
	for name := range w.have {
		if w.children(name) == 0 {
			continue
		}
		if w.call("remove", nil, func(ctx context.Context) error { return w.sn.Remove(ctx, name) }, errdefs.IsFailedPrecondition) {
			w.wrong = append(w.wrong, fmt.Errorf("%s was removed from under its children", name))
		}
		return
	}
}

// query calls Stat, Usage and Mounts of what is there, and Stat of what is not.
func (w *worker) query() {
	for name, s := range w.have {
		w.call("query", nil, func(ctx context.Context) error {
			info, err := w.sn.Stat(ctx, name)
			if err == nil && (info.Kind != s.kind || info.Parent != s.parent) {
				err = fmt.Errorf("%s is %v on %q, want %v on %q", name, info.Kind, info.Parent, s.kind, s.parent)
			}
			if err == nil {
				_, err = w.sn.Usage(ctx, name)
			}
			if err == nil && s.kind != snapshots.KindCommitted {
				_, err = w.sn.Mounts(ctx, name)
			}
			return err
		})
		return
	}
	if w.call("stat of nothing", nil, func(ctx context.Context) error {
		_, err := w.sn.Stat(ctx, w.newName("nothing"))
		return err
	}, errdefs.IsNotFound) {
		w.wrong = append(w.wrong, fmt.Errorf("a name that was never made is there"))
	}
}

func (w *worker) label() {
	for name := range w.have {
		w.call("update", nil, func(ctx context.Context) error {
			_, err := w.sn.Update(ctx, snapshots.Info{Name: name, Labels: map[string]string{"made": fmt.Sprint(w.made)}}, "labels")
			return err
		})
		return
	}
}

// sweep has the daemon delete and list while others work.
func (w *worker) sweep() {
	w.call("clean up", nil, func(ctx context.Context) error { return w.sn.(snapshots.Cleaner).Cleanup(ctx) })
	seen := 0
	w.call("walk", nil, func(ctx context.Context) error {
		seen = 0
		return w.sn.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
			if w.have[info.Name] != nil {
				seen++
			}
			return nil
		})
	})
	if w.pending == nil && len(w.wrong) == 0 && seen != len(w.have) {
		w.wrong = append(w.wrong, fmt.Errorf("walk lists %d of %d snapshots", seen, len(w.have)))
	}
}
