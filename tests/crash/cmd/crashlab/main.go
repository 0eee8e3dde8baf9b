// Command crashlab cuts the power under a snapshotter, thousands of times, and
// prints what is lost. See README.md of tests/crash.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/campaign"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/report"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

const usage = `usage: crashlab VERB [FLAGS]

  run             cut the power in many states of a workload
    --states N      how many, at least (2000)
    --workload W    api: calls to the snapshotter; differ: the same, and its diff
                    service extracts the layers; heal: api on layers that are
                    damaged and heal; full: a whole containerd; all: a round of
                    each, in turn (api)
    --seed N        of workloads and states (1)
    --fs LIST       file systems: ext4,xfs,btrfs (all three)
    --state-dir D   where to keep logs and results (below /var/tmp/crashlab)
    --resume        go on with what is in the state directory
    --first         end at the first state that did not survive
   to test another snapshotter than durable-snapshotter:
    --start CMD     shell command that runs it in the foreground; {root} stands
                    for its directory, {address} for its socket
    --snapshotter-address SOCK, --root DIR (may be repeated)
                    for one without such arguments: its socket, and where it keeps
                    its data; these directories must exist
  replay ID       make a state again, judge it, and leave it mounted until Ctrl-C
    --state-dir D
    --no-hold       do not leave it mounted
  report          write report.html and summary.txt again
    --state-dir D

exit status: 0 nothing found and every gate held, 1 otherwise, 2 wrong usage,
130 interrupted: the same command with --resume goes on

example: crashlab run --states 100000 --fs ext4,xfs --state-dir /var/tmp/lab
`

func main() {
	disk.Init()
	// containerd's content store warns of file systems without fs-verity.
	_ = log.SetLevel("error")
	os.Exit(kit.Main(func() int {
		return kit.InMemory(func() int {
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return run(ctx, os.Args[1:], os.Stdout, os.Stderr)
		})
	}))
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	verbs := map[string]func(context.Context, []string, io.Writer, io.Writer) error{
		"run": runVerb, "replay": replayVerb, "report": reportVerb,
	}
	if len(args) == 0 || verbs[args[0]] == nil {
		fmt.Fprint(stderr, usage)
		return 2
	}
	err := verbs[args[0]](ctx, args[1:], stdout, stderr)
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errUsage):
		fmt.Fprint(stderr, usage)
		return 2
	case errors.Is(err, campaign.ErrInterrupted):
		return 130
	case !errors.Is(err, errFound):
		fmt.Fprintln(stderr, "crashlab:", err)
	}
	return 1
}

var (
	errUsage = errors.New("wrong usage")
	errFound = errors.New("something was found") // and has been printed
)

// parse reads the flags of a verb, which may stand on both sides of its one
// argument.
func parse(f *flag.FlagSet, args []string, stderr io.Writer) (rest []string, err error) {
	f.SetOutput(stderr)
	f.Usage = func() {}
	for {
		if err := f.Parse(args); err != nil {
			return nil, fmt.Errorf("%w: %w", errUsage, err)
		}
		if f.NArg() == 0 {
			return rest, nil
		}
		rest = append(rest, f.Arg(0))
		args = f.Args()[1:]
	}
}

type list []string

func (l *list) String() string     { return strings.Join(*l, ",") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

func runVerb(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	f := flag.NewFlagSet("run", flag.ContinueOnError)
	var (
		o       campaign.Options
		foreign campaign.Foreign
		roots   list
	)
	f.IntVar(&o.States, "states", 2000, "")
	f.StringVar((*string)(&o.Workload), "workload", string(campaign.API), "")
	f.Uint64Var(&o.Seed, "seed", 1, "")
	kinds := f.String("fs", "ext4,xfs,btrfs", "")
	dir := f.String("state-dir", "", "")
	resume := f.Bool("resume", false, "")
	f.BoolVar(&o.First, "first", false, "")
	f.StringVar(&foreign.Start, "start", "", "")
	f.StringVar(&foreign.Address, "snapshotter-address", "", "")
	f.Var(&roots, "root", "")
	rest, err := parse(f, args, stderr)
	if err != nil {
		return err
	}
	if len(rest) > 0 {
		return fmt.Errorf("%w: argument %q", errUsage, rest[0])
	}
	for fs := range strings.SplitSeq(*kinds, ",") {
		o.FS = append(o.FS, disk.FS(fs))
	}
	if foreign.Roots = roots; foreign.Start != "" || foreign.Address != "" || len(roots) > 0 {
		o.Foreign = &foreign
	}
	if *dir == "" {
		*dir = filepath.Join("/var/tmp/crashlab", fmt.Sprintf("%s-%s-%d", o.Workload, strings.ReplaceAll(*kinds, ",", "-"), o.Seed))
		if o.Foreign != nil {
			*dir += "-foreign"
		}
	}
	summary, err := campaign.Run(ctx, *dir, o, *resume, stderr)
	if err != nil && !errors.Is(err, campaign.ErrInterrupted) {
		return err
	}
	return errors.Join(err, conclude(*dir, summary, stdout))
}

// conclude writes the reports and prints the summary, whose last line is the
// one that counts.
func conclude(dir string, summary *campaign.Summary, stdout io.Writer) error {
	store, err := campaign.Open(dir)
	if err != nil {
		return err
	}
	if summary == nil {
		summary = store.Summary()
		summary.Done = true // no more states were requested
	}
	page, err := report.HTML(store)
	if err != nil {
		return err
	}
	text := summary.String()
	if err := errors.Join(store.WriteFile("report.html", page), store.WriteFile("summary.txt", []byte(text+summary.Line()+"\n"))); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "%sreport           %s\n%s\n", text, filepath.Join(dir, "report.html"), summary.Line())
	if !summary.Good() {
		return errFound
	}
	return nil
}

func reportVerb(_ context.Context, args []string, stdout, stderr io.Writer) error {
	f := flag.NewFlagSet("report", flag.ContinueOnError)
	dir := f.String("state-dir", "", "")
	rest, err := parse(f, args, stderr)
	if err != nil {
		return err
	}
	if *dir == "" || len(rest) > 0 {
		return errUsage
	}
	return conclude(*dir, nil, stdout)
}
