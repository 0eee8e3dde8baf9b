// Command durable-snapshotter is a containerd snapshotter, as a proxy plugin,
// whose committed layers survive a power cut.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

const usage = `Usage: durable-snapshotter VERB [flags]

An overlayfs snapshotter for containerd: once a layer is committed, it is whole
on disk, whatever happens to the power.

Verbs:
  serve             serve containerd on a unix socket
  inspect [--json]  print snapshots and commit journal, of a running or a stopped daemon
  check [--deep] [--json] [--cached] [SNAPSHOT...]
                    compare committed layers with their seals, with --deep their content too,
                    and write nothing; --cached prints what is known, and does not look
  repair [--apply] [--deep] [--json] [SNAPSHOT...]
                    say how damaged layers can be healed, and with --apply heal them
  repair --rebuild  make a new metadata.db from the layers' own records; the daemon must be stopped
  config            print the configuration in effect
  config default    print the default configuration
  version           print the version

Flags of every verb:
  --config FILE     configuration (default /etc/durable-snapshotter/config.toml)
  --root DIR        where snapshots live, overrides "root"
  --address SOCKET  unix socket, overrides "address"
  --log-level LEVEL trace, debug, info, warn or error, overrides "log_level"

Exit status: 0 done; 1 an error; 2 the command line makes no sense. Of check:
0 all are ready; 1 some are not; 2 it could not look. Of repair: 0 all are ready.

Example:
  durable-snapshotter serve --root /var/lib/durable-snapshotter
`

func main() {
	// A second signal ends the process at once: NotifyContext restores the
	// default as soon as serve has seen the first.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	go func() { <-ctx.Done(); stop() }()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// verbs maps a verb to the function that does it.
var verbs = map[string]func(*command) error{
	"serve":   serve,
	"check":   check,
	"inspect": inspect,
	"repair":  repair,
	"config":  printConfig,
	"version": printVersion,
}

// command is one call of the program.
type command struct {
	ctx     context.Context
	stdout  io.Writer
	stderr  io.Writer
	flags   *flag.FlagSet
	args    []string // what follows the verb
	path    string   // --config
	setting Config   // the flags that override the file
}

// errUsage is wrapped by errors in the command line.
var errUsage = errors.New("see durable-snapshotter help")

// run is main without the process: it returns the exit status.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		return 2
	}
	switch args[0] {
	case "help", "-h", "-help", "--help":
		fmt.Fprint(stdout, usage)
		return 0
	case "--version", "-version", "-v":
		args[0] = "version"
	}
	verb, ok := verbs[args[0]]
	if !ok {
		return report(stderr, fmt.Errorf("%q is not a verb: %w", args[0], errUsage))
	}
	c := &command{ctx: ctx, stdout: stdout, stderr: stderr, args: args[1:]}
	c.flags = flag.NewFlagSet(args[0], flag.ContinueOnError)
	c.flags.SetOutput(io.Discard)
	c.flags.StringVar(&c.path, "config", "", "")
	c.flags.StringVar(&c.setting.Root, "root", "", "")
	c.flags.StringVar(&c.setting.Address, "address", "", "")
	c.flags.StringVar(&c.setting.LogLevel, "log-level", "", "")
	return report(stderr, verb(c))
}

// parse reads the flags of a verb; extra ones are defined on c.flags before. It
// returns what is left over.
func (c *command) parse() ([]string, error) {
	err := c.flags.Parse(c.args)
	if errors.Is(err, flag.ErrHelp) {
		fmt.Fprint(c.stdout, usage)
		return nil, err
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errUsage)
	}
	return c.flags.Args(), nil
}

// parseOnly is parse for a verb that takes no arguments.
func (c *command) parseOnly() error {
	rest, err := c.parse()
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("unexpected argument %q: %w", rest[0], errUsage)
	}
	return err
}

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
	if errors.Is(err, errUsage) || errors.Is(err, errNotLooked) {
		return 2
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
	{storage.ErrNewer, "the data is intact; run the version that wrote it, or a newer one"},
	{fsync.ErrUnsuitable, "set root to a directory on a local ext4, xfs or btrfs file system"},
}
