// Command stocksnapshotter serves containerd's built-in overlay snapshotter, as
// it is, on a unix socket. It is the control of the crash tests: the same
// harness must find that it loses layers.
//
//	stocksnapshotter --root DIR --address SOCKET
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
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *root == "" || *address == "" {
		return errors.New("--root and --address are needed")
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()

	// AsynchronousRemove is what containerd's own plugin sets by default.
	s, err := overlay.NewSnapshotter(*root, overlay.AsynchronousRemove)
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
