// Command bench measures whole pulls, and the single calls of a snapshotter, with containerd's
// snapshotters and with durable-snapshotter, single layers beside a neighbor, and boots. It makes
// tables and charts of what it has measured. docs/performance.md has the meaning of the figures,
// packages tests/bench/pulls, tests/bench/paths, tests/bench/layers and tests/bench/boot how they are
// measured.
//
//	go run ./cmd/bench run --out ../bin/bench --name ext4-fast
//	go run ./cmd/bench table ../docs/bench/ext4-fast.json
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/boot"
	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/layers"
	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/paths"
	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/published"
	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/pulls"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

const usage = `usage: go run ./cmd/bench VERB        (in tests/)

  run [flags]                  measures pulls, as root, prints a table, and writes NAME.json and NAME.svg
  paths [flags]                measures calls and starts, as root, prints a table, and writes NAME.json
  layers [flags]               measures extractions and Commits of single layers beside a neighbor, as root,
                               prints a table, and writes NAME.json
  boot [flags]                 measures what a node waits for after it was switched on, as root, prints a
                               table, and writes NAME.json
  table FILE.json              prints the table of a report
  table --into DOCUMENT FILE.json
                               replaces the table of this report in a document, or adds it at the end
  chart FILE.json              prints the chart of a report on pulls, as SVG
  compare FILE.json            prints the comparison of a report with --base

  run -h, paths -h, layers -h, boot -h  list the flags
`

func main() {
	pulls.Init()
	if len(os.Args) < 2 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	verb, args := os.Args[1], os.Args[2:]
	var err error
	switch verb {
	case "run":
		runPulls(args)
	case "paths":
		runPaths(args)
	case "layers":
		runLayers(args)
	case "boot":
		runBoot(args)
	case "table":
		err = table(args)
	case "chart":
		err = show(args, (*pulls.Report).Chart)
	case "compare":
		err = show(args, (*pulls.Report).CompareTable)
	default:
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// wrong ends the program when its flags are wrong.
func wrong(err error) {
	if err != nil {
		if !errors.Is(err, flag.ErrHelp) {
			fmt.Fprintln(os.Stderr, "bench:", err)
		}
		os.Exit(2)
	}
}

// measure does something that can be interrupted, and does not return.
func measure(do func(context.Context) error) {
	if !kit.Inside() {
		// As in cmd/demo: "go run" dies of SIGTERM without passing it on.
		if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGTERM), 0, 0, 0); err != nil {
			fmt.Fprintln(os.Stderr, "bench: set the parent death signal:", err)
			os.Exit(1)
		}
	}
	os.Exit(kit.Main(func() int {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
		defer stop()
		err := do(ctx)
		switch {
		case ctx.Err() != nil:
			fmt.Fprintln(os.Stderr, "bench: interrupted")
			return 130
		case err != nil:
			fmt.Fprintln(os.Stderr, "bench:", err)
			return 1
		}
		return 0
	}))
}

// runPulls measures pulls, and does not return.
func runPulls(args []string) {
	o, out, name, err := parse(args)
	wrong(err)
	measure(func(ctx context.Context) error {
		r, err := pulls.Run(ctx, o)
		if r == nil || len(r.Pulls) == 0 {
			return err
		}
		table := r.Table()
		if r.Base != "" {
			table = r.CompareTable()
		}
		return save(r, r.Chart(), table, out, name, err)
	})
}

// runPaths measures calls and starts, and does not return.
func runPaths(args []string) {
	o, out, name, err := parsePaths(args)
	wrong(err)
	measure(func(ctx context.Context) error {
		r, err := paths.Run(ctx, o)
		if r == nil || len(r.Calls) == 0 {
			return err
		}
		return save(r, "", r.Table(), out, name, err)
	})
}

// runLayers measures single layers, and does not return.
func runLayers(args []string) {
	o, out, name, err := parseLayers(args)
	wrong(err)
	measure(func(ctx context.Context) error {
		r, err := layers.Run(ctx, o)
		if r == nil || len(r.Rows) == 0 {
			return err
		}
		return save(r, "", r.Table(), out, name, err)
	})
}

// runBoot measures boots, and does not return.
func runBoot(args []string) {
	o, out, name, err := parseBoot(args)
	wrong(err)
	measure(func(ctx context.Context) error {
		r, err := boot.Run(ctx, o)
		if r == nil || len(r.Boots) == 0 {
			return err
		}
		return save(r, "", r.Table(), out, name, err)
	})
}

// report is one of any kind.
type report interface {
	Save(file string) error
	Table() string
}

// save writes a report, and a chart if it has one. An interrupted run has figures, too; they do not
// take the place of whole ones.
func save(r report, chart, table, out, name string, err error) error {
	if err != nil {
		name += ".part"
	}
	file := filepath.Join(out, name)
	failed := os.MkdirAll(out, 0o755)
	if failed == nil {
		failed = r.Save(file + ".json")
	}
	files := file + ".json"
	if failed == nil && chart != "" {
		failed = os.WriteFile(file+".svg", []byte(chart), 0o644)
		files += ", " + file + ".svg"
	}
	fmt.Printf("\n%s\n%s\n", table, files)
	return errors.Join(err, failed)
}

// load reads a report of any kind.
func load(file string) (report, error) {
	if r, err := paths.Load(file); err == nil {
		return r, nil
	}
	if r, err := layers.Load(file); err == nil {
		return r, nil
	}
	if r, err := boot.Load(file); err == nil {
		return r, nil
	}
	return pulls.Load(file)
}

func table(args []string) error {
	f := flag.NewFlagSet("bench table", flag.ContinueOnError)
	into := f.String("into", "", "a document")
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() != 1 {
		return errors.New("one file of a report is needed")
	}
	r, err := load(f.Arg(0))
	switch {
	case err != nil:
		return err
	case *into != "":
		return published.Insert(*into, filepath.Base(f.Arg(0)), r.Table())
	}
	_, err = fmt.Print(r.Table())
	return err
}

// show prints a report in one of its forms.
func show(args []string, form func(*pulls.Report) string) error {
	if len(args) != 1 {
		return errors.New("one file of a report is needed")
	}
	r, err := pulls.Load(args[0])
	if err != nil {
		return err
	}
	_, err = fmt.Print(form(r))
	return err
}
