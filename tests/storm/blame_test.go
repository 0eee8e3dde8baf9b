package storm

import (
	"fmt"
	"os"
	"slices"
	"sync"
	"time"
)

// disturbance is something that an actor does to others.
type disturbance struct {
	what      string
	namespace string   // all when empty
	refs      []string // images; all when empty
	from, to  time.Time
	open      bool // it is not over
	pods      bool // it is over for pulls, and not for containers
}

// ledger knows what was disturbed when, and logs everything.
type ledger struct {
	mu   sync.Mutex
	log  *os.File
	zero time.Time
	all  []*disturbance
}

func newLedger(file string) (*ledger, error) {
	f, err := os.Create(file)
	return &ledger{log: f, zero: time.Now()}, err
}

// printf logs a line.
func (l *ledger) printf(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	fmt.Fprintf(l.log, "%9.3f %s\n", time.Since(l.zero).Seconds(), fmt.Sprintf(format, args...))
}

// disturb notes that pulls of the images in the namespace are disturbed from now on,
// until end is called. It is called before the act.
func (l *ledger) disturb(what, namespace string, refs ...string) (end func()) {
	d := &disturbance{what: what, namespace: namespace, refs: refs, from: time.Now(), open: true}
	l.printf("disturb: %s, namespace %q, images %q", what, namespace, refs)
	l.mu.Lock()
	l.all = append(l.all, d)
	l.mu.Unlock()
	return func() {
		l.mu.Lock()
		d.to, d.open = time.Now(), false
		l.mu.Unlock()
		l.printf("over: %s", what)
	}
}

// lack notes that the images in the namespace lack something until everything is mended, which
// a pull brings. A container of them may lack it: one is made without a pull of an image that
// is known.
func (l *ledger) lack(what, namespace string, refs ...string) {
	l.printf("lack: %s, namespace %q, images %q", what, namespace, refs)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, &disturbance{what: what, namespace: namespace, refs: refs, pods: true})
}

// excuse is what has disturbed a pull since from, "" when nothing has.
func (l *ledger) excuse(namespace, ref string, from time.Time) string {
	return l.find(namespace, ref, func(d *disturbance) bool { return d.open || d.to.After(from) })
}

// excuseOfPod is the same of a container.
func (l *ledger) excuseOfPod(namespace, ref string, from time.Time) string {
	return l.find(namespace, ref, func(d *disturbance) bool { return d.open || d.pods || d.to.After(from) })
}

func (l *ledger) find(namespace, ref string, is func(*disturbance) bool) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, d := range l.all {
		if is(d) &&
			(d.namespace == "" || d.namespace == namespace) &&
			(len(d.refs) == 0 || slices.Contains(d.refs, ref)) {
			return d.what
		}
	}
	return ""
}

// settled forgets all disturbances: what they have done is mended.
func (l *ledger) settled() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = nil
}
