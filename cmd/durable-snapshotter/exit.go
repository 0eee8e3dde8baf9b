package main

import (
	"errors"
	"flag"
	"fmt"
	"io"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// report prints an error, with the cure when it is known, and returns the exit
// status.
func report(stderr io.Writer, err error) int {
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return 0
	}
	fmt.Fprintf(stderr, "durable-snapshotter: %v\n", err)
	for _, h := range hints {
		if errors.Is(err, h.err) {
			fmt.Fprintf(stderr, "durable-snapshotter: hint: %s\n", h.text)
		}
	}
	if errors.Is(err, errUsage) || errors.Is(err, errNotVerified) || errors.Is(err, errFailures) {
		return 2
	}
	for _, unknown := range []error{errUnverified, errImagesUnverified, errNotMigrated, errNoAnswer} {
		if errors.Is(err, unknown) {
			return 3
		}
	}
	return 1
}

var hints = []struct {
	err  error
	text string
}{
	{storage.ErrDamaged, "the file was not touched; durable-snapshotter repair --rebuild makes a new one from the layers' own records and keeps this one"},
	{storage.ErrMissing, "if the snapshots are wanted, run durable-snapshotter repair --rebuild; if not, remove the directory snapshots/"},
	{storage.ErrLocked, "stop the other daemon, or give this one another --root"},
	{layout.ErrNewer, "the data is intact; run the version that wrote it, or a newer one"},
	{repull.ErrNotServed, "add it to proxy_plugins in containerd's configuration, with this address, and restart containerd"},
	{fsync.ErrUnsuitable, "set root to a directory on a local ext4, xfs or btrfs file system"},
}
