package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// builtin serves containerd's own overlayfs snapshotter over gRPC, as the daemon
// serves ours, until the benchmark ends. Machines differ and are noisy: what is
// compared with it in the same run means something on all of them.
func builtin(b *testing.B, root string) snapshots.Snapshotter {
	b.Helper()
	dir := scratch(b)
	address := filepath.Join(dir, "sock")
	bin, err := kit.BuildTool(b.Context(), "crash/cmd/stocksnapshotter")
	if err != nil {
		b.Fatal(err)
	}
	p, err := kit.StartProcess("stocksnapshotter", filepath.Join(dir, "log"), nil, bin, "--root", root, "--address", address)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { kittest.Stop(b, p) })
	if err := p.WaitReady(b.Context(), time.Minute, func(context.Context) error { return answers(address) }); err != nil {
		b.Fatal(err)
	}
	conn, err := grpc.NewClient("unix://"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { conn.Close() })
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "overlayfs")
}

// answers connects to a unix socket.
func answers(address string) error {
	conn, err := net.Dial("unix", address)
	if err != nil {
		return err
	}
	return conn.Close()
}

// quantile returns the duration below which the part q of them is.
func quantile(took []time.Duration, q float64) time.Duration {
	sorted := slices.Sorted(slices.Values(took))
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

func median(took []time.Duration) time.Duration { return quantile(took, 0.5) }

// copyFile copies a file of a stopped snapshotter.
func copyFile(b *testing.B, from, to string) {
	b.Helper()
	data, err := os.ReadFile(from)
	if err == nil {
		err = errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, data, 0o600))
	}
	if err != nil {
		b.Fatal(fmt.Errorf("copy %s: %w", from, err))
	}
}
