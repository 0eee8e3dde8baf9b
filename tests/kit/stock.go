package kit

import (
	"context"
	"errors"
	"net"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/snapshots"
)

// Stock is containerd's own overlayfs snapshotter, served over gRPC as the daemon serves
// ours. Stop or Kill it, then Start it again.
type Stock struct {
	*Process
	Root    string
	Address string
	binary  string
	log     string
}

// NewStock builds the program that serves a root. It starts nothing.
func NewStock(ctx context.Context, root, runDir string) (*Stock, error) {
	binary, err := BuildTool(ctx, "crash/cmd/stocksnapshotter")
	return &Stock{Root: root, Address: filepath.Join(runDir, "stock.sock"), binary: binary, log: filepath.Join(runDir, "stock.log")}, err
}

// Launch starts it and does not wait for it.
func (s *Stock) Launch() (err error) {
	s.Process, err = StartProcess("stocksnapshotter", s.log, nil, s.binary, "--root", s.Root, "--address", s.Address)
	return err
}

// Start starts it and waits until its socket answers.
func (s *Stock) Start(ctx context.Context) error {
	if err := s.Launch(); err != nil {
		return err
	}
	if err := s.WaitReady(ctx, slow, func(context.Context) error { return Answers(s.Address) }); err != nil {
		return errors.Join(err, s.Kill())
	}
	return nil
}

// Snapshotter is Daemon.Snapshotter's.
func (s *Stock) Snapshotter() (snapshots.Snapshotter, error) { return connect(s.Address, "overlayfs") }

// Answers connects to a unix socket.
func Answers(address string) error {
	conn, err := net.Dial("unix", address)
	if err != nil {
		return err
	}
	return conn.Close()
}
