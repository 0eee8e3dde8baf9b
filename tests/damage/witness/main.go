// Command witness runs in the containers of package damage and writes down what
// a process of the image sees, one JSON object per round.
//
//	witness ROUNDS PATH...
//
// It opens every PATH that is a file at the start and keeps it open. Each round
// it reads those files, looks up all paths anew, counts in the file /count, and
// prints an observation. With 0 rounds it goes on until it is stopped.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// observation is what package damage reads.
type observation struct {
	Round int               `json:"round"`
	Held  map[string]string `json:"held"`  // content of the open files
	Seen  map[string]string `json:"seen"`  // content by path; names in a directory
	Count string            `json:"count"` // read back from /count
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "witness:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 2 {
		return errors.New("want the number of rounds and paths to read")
	}
	rounds, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	held := map[string]*os.File{}
	for _, path := range args[1:] {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		if st, err := f.Stat(); err != nil || st.IsDir() {
			f.Close()
			continue
		}
		held[path] = f
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	out := json.NewEncoder(os.Stdout)
	for n := 1; ; n++ {
		if err := out.Encode(observe(n, held, args[1:])); err != nil {
			return err
		}
		if n == rounds {
			return nil
		}
		select {
		case <-signals:
			return nil
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// observe never fails: an error is what is seen.
func observe(n int, held map[string]*os.File, paths []string) observation {
	o := observation{Round: n, Held: map[string]string{}, Seen: map[string]string{}}
	for path, f := range held {
		o.Held[path] = content(f)
	}
	for _, path := range paths {
		o.Seen[path] = read(path)
	}
	o.Count = count(n)
	return o
}

func content(f *os.File) string {
	b := make([]byte, 4096)
	n, err := f.ReadAt(b, 0)
	if n == 0 && err != nil {
		return "error: " + err.Error()
	}
	return string(b[:n])
}

func read(path string) string {
	if entries, err := os.ReadDir(path); err == nil {
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		return strings.Join(names, " ")
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return "error: " + err.Error()
	}
	return string(b)
}

func count(n int) string {
	if err := os.WriteFile("/count", []byte(strconv.Itoa(n)), 0o644); err != nil {
		return "error: " + err.Error()
	}
	return read("/count")
}
