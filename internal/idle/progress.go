package idle

import (
	"context"
	"time"

	"github.com/containerd/log"
)

const progressEvery = 10 * time.Second // between two log lines on background work

// Progress logs how far work on many layers is.
type Progress struct {
	what               string
	started, logged    time.Time
	done, of, notReady int
	bytes              int64 // of content
}

// NewProgress begins work on so many layers.
func NewProgress(what string, of int) *Progress {
	return &Progress{what: what, started: time.Now(), logged: time.Now(), of: of}
}

// Step counts a layer.
func (p *Progress) Step(ctx context.Context, ready bool) {
	p.done++
	if !ready {
		p.notReady++
	}
	p.logSometimes(ctx)
}

// Read counts content; large layers take long.
func (p *Progress) Read(ctx context.Context, bytes int64) {
	p.bytes += bytes
	p.logSometimes(ctx)
}

func (p *Progress) logSometimes(ctx context.Context) {
	if time.Since(p.logged) >= progressEvery {
		p.logged = time.Now()
		p.Log(ctx, p.what)
	}
}

// Log logs it now.
func (p *Progress) Log(ctx context.Context, what string) {
	log.G(ctx).WithFields(log.Fields{
		"done": p.done, "of": p.of, "not_ready": p.notReady, "bytes": p.bytes, "took": time.Since(p.started).String(),
	}).Info(what)
}
