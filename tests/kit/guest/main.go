// Command guest is the only program in the image that kit.Runnable builds: what
// a test needs to do inside a container, in one static binary.
package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
)

const usage = `usage: guest echo WORD...      print the words; so does a link with the name echo
       guest cat FILE          print the file
       guest write FILE TEXT   write the file and sync it
       guest sum DIR           print the SHA-256 of every file below DIR
       guest wait              wait for SIGTERM or SIGINT
`

func main() {
	args := os.Args[1:]
	if filepath.Base(os.Args[0]) == "echo" {
		args = os.Args
		args[0] = "echo"
	}
	if err := do(args); err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
		os.Exit(1)
	}
}

func do(args []string) error {
	switch {
	case len(args) >= 1 && args[0] == "echo":
		fmt.Println(strings.Join(args[1:], " "))
		return nil
	case len(args) == 2 && args[0] == "cat":
		b, err := os.ReadFile(args[1])
		if err != nil {
			return err
		}
		_, err = os.Stdout.Write(b)
		return err
	case len(args) == 3 && args[0] == "write":
		return write(args[1], args[2])
	case len(args) == 2 && args[0] == "sum":
		return sum(args[1])
	case len(args) == 1 && args[0] == "wait":
		signals := make(chan os.Signal, 1)
		signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
		fmt.Println("waiting")
		<-signals
		return nil
	}
	return fmt.Errorf("unknown command %q\n%s", args, usage)
}

func write(name, text string) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	if _, err := f.WriteString(text); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return f.Close()
}

func sum(dir string) error {
	return filepath.WalkDir(dir, func(name string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		h := sha256.New()
		if _, err := io.Copy(h, f); err != nil {
			return err
		}
		fmt.Printf("%x  %s\n", h.Sum(nil), name)
		return nil
	})
}
