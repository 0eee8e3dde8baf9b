// Command usage makes the manual page and the shells' completions out of the
// usage text of durable-snapshotter, which it reads from standard input:
//
//	durable-snapshotter help | go run ./usage -out DIR
//
// They are kept in the tree, so that an installation needs no Go program but the
// product; tests/packaging compares them with the program.
package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

func main() {
	out := flag.String("out", ".", "directory of the files")
	flag.Parse()
	if err := run(os.Stdin, *out); err != nil {
		fmt.Fprintln(os.Stderr, "usage:", err)
		os.Exit(1)
	}
}

func run(in io.Reader, dir string) error {
	text, err := io.ReadAll(in)
	if err != nil {
		return err
	}
	u, err := parse(string(text))
	if err != nil {
		return err
	}
	for name, content := range map[string]string{
		"durable-snapshotter.8":    manual(u),
		"durable-snapshotter.bash": bash(u),
		"_durable-snapshotter":     zsh(u),
		"durable-snapshotter.fish": fish(u),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}
