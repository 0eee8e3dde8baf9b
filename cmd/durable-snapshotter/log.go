package main

import (
	"os"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// setUpLog sends the log to standard error: text for a person at a terminal,
// JSON for a program.
func setUpLog(level string) error {
	format := log.JSONFormat
	if isTerminal(os.Stderr) {
		format = log.TextFormat
	}
	if err := log.SetFormat(format); err != nil {
		return err
	}
	return log.SetLevel(level)
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
