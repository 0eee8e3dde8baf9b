package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"syscall"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/internal/admin"
	"github.com/durable-snapshotter/durable-snapshotter/internal/sockets"
	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// errNoDaemon means that no daemon serves the root: it can be read and changed
// directly.
var errNoDaemon = errors.New("no daemon is running")

// request sends a request to the daemon and decodes its answer; body is nil for a
// GET.
func (c *command) request(cfg Config, path string, body, answer any) error {
	method, content := http.MethodGet, []byte(nil)
	if body != nil {
		var err error
		method = http.MethodPost
		if content, err = json.Marshal(body); err != nil {
			return err
		}
	}
	client := http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", sockets.Admin(cfg.Address))
		},
		DisableKeepAlives: true,
	}}
	req, err := http.NewRequestWithContext(c.ctx, method, "http://admin"+path, bytes.NewReader(content))
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return errNoDaemon
	}
	if err != nil {
		return fmt.Errorf("ask the daemon: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		return fmt.Errorf("ask the daemon: %s: %s", resp.Status, bytes.TrimSpace(text))
	}
	return json.NewDecoder(resp.Body).Decode(answer)
}

// report gets the report from a running daemon, which holds the lock of metadata.db,
// and reads the file when none is running. live is true when a daemon runs.
func (c *command) report(cfg Config) (r snapshotter.Report, live bool, err error) {
	err = c.whileStarting(func() error {
		live = true
		err := c.request(cfg, admin.InspectPath, nil, &r)
		if errors.Is(err, errNoDaemon) || err == nil && r.Root != cfg.Root {
			// Or the socket belongs to a daemon with another root.
			live = false
			r, err = snapshotter.InspectRoot(c.ctx, cfg.Root)
		}
		return err
	})
	return r, live, err
}

// startsWithin is how long a daemon may have the root before its socket answers.
const startsWithin = 10 * time.Second

// whileStarting calls do again while its error is that another process has the root: a daemon
// that was started meanwhile answers soon.
func (c *command) whileStarting(do func() error) error {
	for until := time.Now().Add(startsWithin); ; {
		err := do()
		if !errors.Is(err, storage.ErrLocked) || time.Now().After(until) {
			return err
		}
		select {
		case <-c.ctx.Done():
			return err
		case <-time.After(100 * time.Millisecond):
		}
	}
}
