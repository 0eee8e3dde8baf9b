package main

import (
	"context"
	"flag"
	"fmt"
	"io"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/campaign"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
)

func replayVerb(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	f := flag.NewFlagSet("replay", flag.ContinueOnError)
	dir := f.String("state-dir", "", "")
	pass := f.Bool("no-hold", false, "")
	rest, err := parse(f, args, stderr)
	if err != nil {
		return err
	}
	if *dir == "" || len(rest) != 1 {
		return errUsage
	}
	hold := func(r lab.Result, mountpoint string) error {
		fmt.Fprintln(stdout, r)
		// Outside of our PID namespace we have another number, which we do not
		// know; who has the mount is a way to find it.
		fmt.Fprintf(stdout, `
mounted at %[1]s, in the mount namespace of this process; from another terminal, as root:
  nsenter --mount --target $(grep -lsF %[1]s /proc/[0-9]*/mountinfo | head -1 | cut -d/ -f3) ls -la %[1]s/root
Ctrl-C unmounts it
`, mountpoint)
		<-ctx.Done()
		return nil
	}
	if *pass {
		hold = func(r lab.Result, _ string) error {
			fmt.Fprintln(stdout, r)
			return nil
		}
	}
	// Ctrl-C is for hold; the replay itself takes a second.
	result, err := campaign.Replay(context.WithoutCancel(ctx), *dir, rest[0], hold)
	if err != nil {
		return err
	}
	if result.Verdict != lab.Survived {
		return errFound
	}
	return nil
}
