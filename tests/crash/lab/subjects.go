package lab

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/defects"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// Bench holds the programs under test, and a directory for their sockets and
// logs.
type Bench struct {
	Dir    string // not on a disk under test
	Ours   string // durable-snapshotter
	Faulty string // the same with planted defects, of which none is active until one is named
	Stock  string // containerd's overlay snapshotter
}

// NewBench builds what is to be tested.
func NewBench() (*Bench, error) {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return nil, err
	}
	b := &Bench{Dir: dir}
	if b.Ours, err = kit.BuildDaemon(ctx, "durable-snapshotter"); err != nil {
		return nil, err
	}
	if b.Faulty, err = defects.Build(); err != nil {
		return nil, err
	}
	if b.Stock, err = kit.BuildTool(ctx, "crash/cmd/stocksnapshotter"); err != nil {
		return nil, err
	}
	return b, nil
}

// Close removes the directory.
func (b *Bench) Close() error { return os.RemoveAll(b.Dir) }

// Daemon is durable-snapshotter as a process. who keeps the sockets and logs of
// several at a time apart; env is added to its environment.
func (b *Bench) Daemon(binary, who string, env ...string) oracle.Process {
	return oracle.Process{
		Command: []string{binary, "serve", "--config", "{config}", "--root", "{root}", "--address", "{address}", "--log-level", "info"},
		Content: "{root}/../" + oracle.ContentName,
		Env:     env,
		Address: filepath.Join(b.Dir, who, "s"),
		Log:     filepath.Join(b.Dir, who+".log"),
	}
}

// WithSync is a daemon that makes its extractions durable in one way, whatever others have
// to be written.
func WithSync(p oracle.Process, mode fsync.Mode) oracle.Process {
	p.Config += fmt.Sprintf("[diff]\nsync = %q\n", mode)
	return p
}

// StockDaemon is containerd's overlay snapshotter as a process, or ours in its
// place when there is none: a control that survives.
func (b *Bench) StockDaemon(who string) oracle.Process {
	if b.Stock == "" {
		return b.Daemon(b.Ours, who)
	}
	return oracle.Process{
		Command: []string{b.Stock, "--root", "{root}", "--address", "{address}"},
		Address: filepath.Join(b.Dir, who, "s"),
		Log:     filepath.Join(b.Dir, who+".log"),
	}
}
