package main

import (
	"fmt"
	"runtime"
)

// version and revision are set by the Makefile (-ldflags -X).
var (
	version  = "0.0.0+unknown"
	revision = "unknown"
)

func printVersion(c *command) error {
	if err := c.parseOnly(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(c.stdout, "durable-snapshotter %s %s %s\n", version, revision, runtime.Version())
	return err
}
