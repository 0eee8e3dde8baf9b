// Command bench measures whole pulls with containerd's snapshotters and with durable-snapshotter,
// and makes tables and charts of what it has measured. docs/performance.md has the meaning of
// the figures, package tests/bench/pulls how they are measured.
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
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/published"
	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/pulls"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

const usage = `usage: go run ./cmd/bench VERB        (in tests/)

  run [flags]                  measures, as root, prints a table, and writes NAME.json and NAME.svg
  table FILE.json              prints the table of a report
  table --into DOCUMENT FILE.json
                               replaces the table of this report in a document, or adds it at the end
  chart FILE.json              prints the chart of a report, as SVG
  compare FILE.json            prints the comparison of a report with --base

  run -h                       lists the flags
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
		measure(args)
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

// measure does not return.
func measure(args []string) {
	o, out, name, err := parse(args)
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	}
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
		report, err := pulls.Run(ctx, o)
		if report != nil && len(report.Pulls) > 0 {
			// An interrupted run has figures, too; they do not take the place of whole ones.
			if err != nil {
				name += ".part"
			}
			err = errors.Join(err, save(report, out, name))
		}
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

func save(r *pulls.Report, out, name string) error {
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}
	file := filepath.Join(out, name)
	err := errors.Join(r.Save(file+".json"), os.WriteFile(file+".svg", []byte(r.Chart()), 0o644))
	if r.Base != "" {
		fmt.Printf("\n%s", r.CompareTable())
	} else {
		fmt.Printf("\n%s", r.Table())
	}
	fmt.Printf("\n%s.json, %s.svg\n", file, file)
	return err
}

// parse reads the flags of run.
func parse(args []string) (o pulls.Options, out, name string, err error) {
	var all []string
	for _, v := range pulls.Variants {
		all = append(all, v.Name)
	}
	f := flag.NewFlagSet("bench run", flag.ContinueOnError)
	images := f.String("images", strings.Join(pulls.ImageNames, ","), "the images to pull")
	variants := f.String("variants", strings.Join(all, ","), "the variants, which take turns")
	igzip := f.String("igzip", "no,yes", "whether igzip is on PATH: no, yes or both")
	unpacks := f.String("unpacks", "1,3", "how many layers containerd unpacks at a time")
	f.IntVar(&o.Rounds, "rounds", 10, "rounds that are counted; one more fills caches")
	f.IntVar(&o.Scale, "scale", 1, "one part in so many of the images' inodes and bytes")
	f.StringVar(&o.FS, "fs", "ext4", "the file system: ext4, xfs or btrfs")
	f.StringVar(&o.Disk, "disk", "fast", "the disk: fast, as the machine's; 250, of 250 MB/s; emmc, of 40 MB/s and 1,000 write requests a second")
	neighbor := f.Int64("neighbor", 0, "MB/s at which another process writes to pages of a file on the same file system")
	f.StringVar(&o.Base, "base", "", "a revision whose daemon is measured, too")
	f.StringVar(&o.Profiles, "profiles", "", "a directory for CPU, block and mutex profiles of the daemon, of pulls after the last round")
	f.StringVar(&o.Store, "store", "", "the directory in which images stay from run to run (default tests/.bin/bench)")
	f.StringVar(&out, "out", "", "the directory for the result (default bin/bench)")
	f.StringVar(&name, "name", "", "the name of the result (default such as ext4-fast)")
	if err := f.Parse(args); err != nil {
		return o, "", "", err
	}
	if f.NArg() > 0 {
		return o, "", "", fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	if o.Rounds < 1 || o.Scale < 1 || *neighbor < 0 {
		return o, "", "", errors.New("rounds and scale are at least 1, and neighbor at least 0")
	}
	o.Images, o.Variants, o.Neighbor = strings.Split(*images, ","), strings.Split(*variants, ","), *neighbor*1e6
	for word := range strings.SplitSeq(*igzip, ",") {
		if word != "no" && word != "yes" {
			return o, "", "", fmt.Errorf("igzip %q is neither no nor yes", word)
		}
		o.Igzip = append(o.Igzip, word == "yes")
	}
	for word := range strings.SplitSeq(*unpacks, ",") {
		n, err := strconv.Atoi(word)
		if err != nil || n < 1 {
			return o, "", "", fmt.Errorf("unpacks %q is no number from 1", word)
		}
		o.Unpacks = append(o.Unpacks, n)
	}
	tests, err := kit.Module(context.Background())
	if err != nil {
		return o, "", "", err
	}
	if o.Store == "" {
		o.Store = filepath.Join(tests, ".bin", "bench")
	}
	if out == "" {
		out = filepath.Join(filepath.Dir(tests), "bin", "bench")
	}
	for _, dir := range []*string{&o.Store, &out, &o.Profiles} {
		if *dir != "" {
			if *dir, err = filepath.Abs(*dir); err != nil {
				return o, "", "", err
			}
		}
	}
	if name == "" {
		name = o.FS + "-" + o.Disk
		if o.Neighbor > 0 {
			name += "-neighbor"
		}
	}
	o.Command = "bench run"
	f.Visit(func(x *flag.Flag) {
		if !slices.Contains([]string{"out", "name", "store", "profiles"}, x.Name) { // they change no figure
			o.Command += fmt.Sprintf(" --%s %s", x.Name, x.Value)
		}
	})
	o.Log = func(format string, args ...any) { fmt.Printf(format+"\n", args...) }
	return o, out, name, nil
}

func table(args []string) error {
	f := flag.NewFlagSet("bench table", flag.ContinueOnError)
	into := f.String("into", "", "a document")
	if err := f.Parse(args); err != nil {
		return err
	}
	if *into == "" {
		return show(f.Args(), (*pulls.Report).Table)
	}
	if f.NArg() != 1 {
		return errors.New("one file of a report is needed")
	}
	r, err := pulls.Load(f.Arg(0))
	if err != nil {
		return err
	}
	return published.Insert(*into, filepath.Base(f.Arg(0)), r.Table())
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
