// Command count prints what package house holds to limits, for each package of a module:
//
//	go run ./house/cmd/count [-v] [-C DIR]        in tests/; DIR is the product's unless set
package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"text/tabwriter"

	"github.com/durable-snapshotter/durable-snapshotter/tests/house/count"
)

func main() {
	dir := flag.String("C", "..", "directory of the module")
	verbose := flag.Bool("v", false, "print the locks, and the arrows that run back up")
	flag.Parse()
	if err := run(*dir, *verbose); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(dir string, verbose bool) error {
	all, err := count.Load(dir, "faults", "./...")
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "PACKAGE\tLINES\tMOST METHODS\tLONGEST FUNCTION\tLOCKS\tARROWS BACK UP")
	for _, p := range all {
		typ, methods := p.MostMethods()
		longest := p.Longest()
		fmt.Fprintf(w, "%s\t%d\t%d %s\t%d %s\t%d\t%d of %d\n", filepath.Base(p.Path), p.Lines, methods, typ, longest.Lines, longest.Name, len(p.Locks), len(p.Up), len(p.Arrows))
	}
	if err := w.Flush(); err != nil || !verbose {
		return err
	}
	for _, p := range all {
		fmt.Printf("\n%s\n  files: %q\n  locks: %q\n", p.Path, p.Files, p.Locks)
		for _, a := range p.Up {
			fmt.Printf("  %s uses %s\n", a.From, a.To)
		}
	}
	return nil
}
