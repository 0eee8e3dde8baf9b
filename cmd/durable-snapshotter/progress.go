package main

import (
	"fmt"
	"os"
	"strings"
	"time"
)

// progress is a bar on a terminal that shows how far a check is.
type progress struct {
	out         *os.File // nil: standard error is no terminal
	done, total int
	what        string
	bytes       int64 // of content
	drawn       time.Time
}

func newProgress(c *command, total int) *progress {
	p := &progress{total: total, what: "snapshots"}
	if f, ok := c.stderr.(*os.File); ok && isTerminal(f) {
		p.out = f
	}
	return p
}

func (p *progress) step() {
	p.done++
	p.draw()
}

// set is step where the caller counts.
func (p *progress) set(done, total int) {
	p.done, p.total = done, total
	p.draw()
}

// read counts content that was read.
func (p *progress) read(bytes int64) {
	p.bytes += bytes
	if time.Since(p.drawn) > 100*time.Millisecond {
		p.draw()
	}
}

func (p *progress) draw() {
	const width = 30
	if p.out == nil || p.total == 0 {
		return
	}
	p.drawn = time.Now()
	full := width * p.done / p.total
	text := fmt.Sprintf("[%s%s] %d of %d %s", strings.Repeat("#", full), strings.Repeat(" ", width-full), p.done, p.total, p.what)
	if p.bytes > 0 {
		text += fmt.Sprintf(", %d MiB read", p.bytes>>20)
	}
	fmt.Fprint(p.out, "\r", text, "\x1b[K")
}

func (p *progress) clear() {
	if p.out != nil {
		fmt.Fprint(p.out, "\r\x1b[K")
	}
}
