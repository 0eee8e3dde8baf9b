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

	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
)

// The paths of admin.sock. Requests and answers are JSON.
const (
	inspectPath = "/v1/inspect" // GET: snapshotter.Report
	repairPath  = "/v1/repair"  // POST snapshotter.RepairOptions: []snapshotter.RepairResult
)

// serveAdmin serves HTTP on admin.sock for those who look.
func serveAdmin(ctx context.Context, cfg Config, sn *snapshotter.Snapshotter) (*http.Server, error) {
	l, err := listen(ctx, adminSocket(cfg.Address))
	if err != nil {
		return nil, err
	}
	server := &http.Server{Handler: adminHandler(sn), ReadHeaderTimeout: 10 * time.Second}
	go func() {
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			log.G(ctx).WithError(err).Error("the admin socket is closed")
		}
	}()
	return server, nil
}

func adminHandler(sn *snapshotter.Snapshotter) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+inspectPath, func(w http.ResponseWriter, r *http.Request) {
		report, err := sn.Inspect(r.Context())
		reply(w, report, err)
	})
	mux.HandleFunc("POST "+repairPath, func(w http.ResponseWriter, r *http.Request) {
		var o snapshotter.RepairOptions
		d := json.NewDecoder(http.MaxBytesReader(w, r.Body, 16<<20))
		d.DisallowUnknownFields()
		if err := d.Decode(&o); err != nil {
			http.Error(w, "repair: "+err.Error(), http.StatusBadRequest)
			return
		}
		results, err := sn.Repair(r.Context(), o)
		reply(w, results, err)
	})
	return mux
}

func reply(w http.ResponseWriter, answer any, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(answer) // an error means that the client has gone
}

// errNoDaemon means that no daemon serves the root: it can be looked at, and
// changed, directly.
var errNoDaemon = errors.New("no daemon is running")

// ask sends a request to the daemon and decodes its answer; body is nil for a
// GET.
func (c *command) ask(cfg Config, path string, body, answer any) error {
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
			return (&net.Dialer{}).DialContext(ctx, "unix", adminSocket(cfg.Address))
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

// report asks a running daemon, which holds the lock of metadata.db, and reads
// the file when none is running. live says which it was.
func (c *command) report(cfg Config) (r snapshotter.Report, live bool, err error) {
	err = c.ask(cfg, inspectPath, nil, &r)
	if errors.Is(err, errNoDaemon) || err == nil && r.Root != cfg.Root {
		// Or the socket belongs to a daemon with another root.
		r, err = snapshotter.InspectRoot(c.ctx, cfg.Root)
		return r, false, err
	}
	return r, true, err
}

func (c *command) printJSON(v any) error {
	enc := json.NewEncoder(c.stdout)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}
