// Command stocksnapshotter serves one of containerd's built-in snapshotters, as
// it is, on a unix socket. The one named overlayfs is the control of the crash
// tests: the same harness must find that it loses layers. The one named native,
// which copies, stands for snapshotters of any other kind.
//
//	stocksnapshotter --root DIR --address SOCKET [--snapshotter overlayfs|native]
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"syscall"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/native"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"google.golang.org/grpc"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "stocksnapshotter:", err)
		os.Exit(1)
	}
}

func run(args []string) (err error) {
	flags := flag.NewFlagSet("stocksnapshotter", flag.ContinueOnError)
	root := flags.String("root", "", "directory of the snapshotter")
	address := flags.String("address", "", "unix socket to serve on")
	kind := flags.String("snapshotter", "overlayfs", "overlayfs or native")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *root == "" || *address == "" {
		return errors.New("--root and --address are needed")
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()

	s, err := open(*kind, *root)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	socket, err := net.Listen("unix", *address)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(s))
	context.AfterFunc(ctx, server.GracefulStop)
	return server.Serve(socket)
}

func open(kind, root string) (snapshots.Snapshotter, error) {
	switch kind {
	case "overlayfs":
		// AsynchronousRemove is what containerd's own plugin sets by default.
		return overlay.NewSnapshotter(root, overlay.AsynchronousRemove)
	case "native":
		return native.NewSnapshotter(root)
	}
	return nil, fmt.Errorf("snapshotter %q: want overlayfs or native", kind)
}
