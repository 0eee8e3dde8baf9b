package campaign

import (
	"fmt"
	"path/filepath"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
)

// subject is the snapshotter under test.
type subject struct {
	name     string
	generic  bool // its directories are not known
	strict   bool // it promises what durable-snapshotter promises
	workers  int  // as many as lab.Check has by itself when 0
	daemon   func(who string) oracle.Process
	recovers func(worker int) oracle.Subject // recovers and answers in a state
	sample   func(worker int) oracle.Subject // the same in every so manieth
	every    int
}

func (c *campaign) subject() subject { return subjectOf(c.Options, c) }

// processes makes the processes of durable-snapshotter.
type processes interface {
	ours(who string) oracle.Process
	sockets() string // directory for sockets and logs
}

func (c *campaign) ours(who string) oracle.Process { return c.bench.Daemon(c.bench.Ours, who) }
func (c *campaign) sockets() string                { return c.bench.Dir }

func subjectOf(o Options, p processes) subject {
	if o.Foreign == nil {
		return subject{
			name: "ours", strict: true, daemon: p.ours,
			recovers: func(int) oracle.Subject { return oracle.InProcess{} },
			// The daemon itself, which costs ten times as much.
			sample: func(n int) oracle.Subject { return p.ours(fmt.Sprintf("boot-%d", n)) },
			every:  100,
		}
	}
	f := o.Foreign
	s := subject{name: "foreign", generic: true}
	s.daemon = func(who string) oracle.Process {
		program := oracle.Process{
			Command: []string{"sh", "-c", "exec " + f.Start},
			Address: filepath.Join(p.sockets(), who, "s"),
			Log:     filepath.Join(p.sockets(), who+".log"),
			Foreign: true,
		}
		if !f.movable() {
			program.Address, program.Roots = f.Address, f.Roots
		}
		return program
	}
	s.recovers = func(n int) oracle.Subject { return s.daemon(fmt.Sprintf("boot-%d", n)) }
	if !f.movable() {
		s.workers = 1 // there is only one of its roots
	}
	return s
}
