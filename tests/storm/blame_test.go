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

// excuse is what has disturbed a pull since from, "" when nothing has.
func (l *ledger) excuse(namespace, ref string, from time.Time) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, d := range l.all {
		if (d.open || d.to.After(from)) &&
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
