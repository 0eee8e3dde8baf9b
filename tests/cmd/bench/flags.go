package main

import (
	"errors"
	"flag"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/boot"
	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/layers"
	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/paths"
	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/pulls"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

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
	f.BoolVar(&o.Fetched, "fetched", false, "fetch each image before its pull is measured, which then only unpacks it")
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
	if o.Unpacks, err = numbers("unpacks", *unpacks); err != nil {
		return o, "", "", err
	}
	if err := defaults(map[*string]string{&o.Store: "tests/.bin/bench", &out: "bin/bench", &o.Profiles: ""}); err != nil {
		return o, "", "", err
	}
	if name == "" {
		name = o.FS + "-" + o.Disk
		if o.Fetched {
			name += "-fetched"
		}
		if o.Neighbor > 0 {
			name += "-neighbor"
		}
	}
	o.Command, o.Log = command(f), logged
	return o, out, name, nil
}

// parsePaths reads the flags of paths.
func parsePaths(args []string) (o paths.Options, out, name string, err error) {
	f := flag.NewFlagSet("bench paths", flag.ContinueOnError)
	snapshots := f.String("snapshots", "100,10000,100000", "how many snapshots there are")
	depths := f.String("depths", "1,10,128", "lengths of the chains that calls are about; those that a node has")
	f.IntVar(&o.Rounds, "rounds", 200, "calls of each kind")
	f.IntVar(&o.Starts, "starts", 3, "starts of each kind")
	f.StringVar(&o.FS, "fs", "ext4", "the file system: ext4, xfs or btrfs")
	f.StringVar(&out, "out", "", "the directory for the result (default bin/bench)")
	f.StringVar(&name, "name", "", "the name of the result (default such as paths-ext4)")
	if err := f.Parse(args); err != nil {
		return o, "", "", err
	}
	if f.NArg() > 0 {
		return o, "", "", fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	if o.Rounds < 1 || o.Starts < 0 {
		return o, "", "", errors.New("rounds are at least 1, and starts at least 0")
	}
	if o.Snapshots, err = numbers("snapshots", *snapshots); err != nil {
		return o, "", "", err
	}
	if slices.Min(o.Snapshots) < paths.Fewest {
		return o, "", "", fmt.Errorf("there must be at least %d snapshots", paths.Fewest)
	}
	if o.Depths, err = numbers("depths", *depths); err != nil {
		return o, "", "", err
	}
	if err := defaults(map[*string]string{&out: "bin/bench"}); err != nil {
		return o, "", "", err
	}
	if name == "" {
		name = "paths-" + o.FS
	}
	o.Command, o.Log = command(f), logged
	return o, out, name, nil
}

// parseLayers reads the flags of layers.
func parseLayers(args []string) (o layers.Options, out, name string, err error) {
	f := flag.NewFlagSet("bench layers", flag.ContinueOnError)
	f.IntVar(&o.Rounds, "rounds", 10, "chains of layers with each setting; one more warms it up")
	f.IntVar(&o.Chain, "chain", 20, "layers of a chain")
	neighbor := f.Int64("neighbor", 400, "MB/s at which another process writes to pages of a file on the same file system")
	f.StringVar(&o.FS, "fs", "ext4", "the file system: ext4, xfs or btrfs")
	f.StringVar(&out, "out", "", "the directory for the result (default bin/bench)")
	f.StringVar(&name, "name", "", "the name of the result (default such as layers-ext4)")
	if err := f.Parse(args); err != nil {
		return o, "", "", err
	}
	if f.NArg() > 0 {
		return o, "", "", fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	if o.Rounds < 1 || o.Chain < 1 || o.Chain > 100 || *neighbor < 1 {
		return o, "", "", errors.New("rounds and neighbor are at least 1, and chain is 1 to 100")
	}
	if err := defaults(map[*string]string{&out: "bin/bench"}); err != nil {
		return o, "", "", err
	}
	if name == "" {
		name = "layers-" + o.FS
	}
	o.Neighbor, o.Command, o.Log = *neighbor*1e6, command(f), logged
	return o, out, name, nil
}

// parseBoot reads the flags of boot.
func parseBoot(args []string) (o boot.Options, out, name string, err error) {
	f := flag.NewFlagSet("bench boot", flag.ContinueOnError)
	layers := f.String("layers", "1000", "how many layers there are; 1000,10000 takes much longer")
	f.IntVar(&o.Rounds, "rounds", 3, "boots of each kind")
	f.StringVar(&o.FS, "fs", "ext4", "the file system: ext4, xfs or btrfs")
	f.StringVar(&o.Disk, "disk", "fast", "the disk, as for run: fast, 250 or emmc")
	f.StringVar(&out, "out", "", "the directory for the result (default bin/bench)")
	f.StringVar(&name, "name", "", "the name of the result (default such as boot-ext4-fast)")
	if err := f.Parse(args); err != nil {
		return o, "", "", err
	}
	if f.NArg() > 0 {
		return o, "", "", fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	if o.Rounds < 1 {
		return o, "", "", errors.New("rounds are at least 1")
	}
	if _, known := pulls.Disks[o.Disk]; !known {
		return o, "", "", fmt.Errorf("disk %q is not fast, 250 or emmc", o.Disk)
	}
	if o.Layers, err = numbers("layers", *layers); err != nil {
		return o, "", "", err
	}
	if slices.Min(o.Layers) < boot.Fewest {
		return o, "", "", fmt.Errorf("there must be at least %d layers", boot.Fewest)
	}
	if err := defaults(map[*string]string{&out: "bin/bench"}); err != nil {
		return o, "", "", err
	}
	if name == "" {
		name = "boot-" + o.FS + "-" + o.Disk
	}
	o.Command, o.Log = command(f), logged
	return o, out, name, nil
}

// numbers reads numbers from 1, with commas between them.
func numbers(what, text string) (all []int, err error) {
	for word := range strings.SplitSeq(text, ",") {
		n, err := strconv.Atoi(word)
		if err != nil || n < 1 {
			return nil, fmt.Errorf("%s %q is no number from 1", what, word)
		}
		all = append(all, n)
	}
	return all, nil
}

// defaults makes paths absolute, and gives those that are empty their default in the project, if
// they have one.
func defaults(all map[*string]string) error {
	tests, err := kit.Module()
	if err != nil {
		return err
	}
	for path, usual := range all {
		if *path == "" && usual != "" {
			*path = filepath.Join(filepath.Dir(tests), usual)
		}
		if *path != "" {
			if *path, err = filepath.Abs(*path); err != nil {
				return err
			}
		}
	}
	return nil
}

// command is the command line, without what changes no figure.
func command(f *flag.FlagSet) string {
	text := f.Name()
	f.Visit(func(x *flag.Flag) {
		switch b, _ := x.Value.(interface{ IsBoolFlag() bool }); {
		case slices.Contains([]string{"out", "name", "store", "profiles"}, x.Name):
		case b != nil && b.IsBoolFlag():
			text += fmt.Sprintf(" --%s=%s", x.Name, x.Value) // a value that stands alone is an argument
		default:
			text += fmt.Sprintf(" --%s %s", x.Name, x.Value)
		}
	})
	return text
}

func logged(format string, args ...any) { fmt.Printf(format+"\n", args...) }
