// Command durable-snapshotter is a containerd snapshotter, as a proxy plugin,
// whose committed layers survive a power cut.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		<-signals
		stop()
		// A second signal ends the process at once. Its default action would not
		// where it is the first process of a container.
		os.Exit(128 + int((<-signals).(syscall.Signal)))
	}()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// verbs maps a verb to the function that does it.
var verbs = map[string]func(*command) error{
	"serve":   serve,
	"check":   check,
	"inspect": inspect,
	"repair":  repair,
	"health":  printHealth,
	"migrate": migrateImages,
	"doctor":  examine,
	"config":  printConfig,
	"version": printVersion,
}

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
		return report(stderr, fmt.Errorf("unknown command %q: %w", args[0], errUsage))
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
