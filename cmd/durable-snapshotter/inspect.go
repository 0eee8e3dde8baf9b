package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
)

const inspectPath = "/v1/inspect"

func adminHandler(sn *snapshotter.Snapshotter) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+inspectPath, func(w http.ResponseWriter, r *http.Request) {
		report, err := sn.Inspect(r.Context())
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(report) // an error means that the client has gone
	})
	return mux
}

// inspect prints what metadata.db says.
func inspect(c *command) error {
	asJSON := c.flags.Bool("json", false, "")
	if err := c.parseOnly(); err != nil {
		return err
	}
	cfg, err := c.config()
	if err != nil {
		return err
	}
	report, err := c.report(cfg)
	if err != nil {
		return err
	}
	if *asJSON {
		enc := json.NewEncoder(c.stdout)
		enc.SetIndent("", "  ")
		return enc.Encode(report)
	}
	return printReport(c.stdout, report)
}

// report asks a running daemon, which holds the lock of metadata.db, and reads
// the file when none is running.
func (c *command) report(cfg Config) (snapshotter.Report, error) {
	r, err := inspectLive(c.ctx, adminSocket(cfg.Address))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return snapshotter.InspectRoot(c.ctx, cfg.Root)
	}
	if err == nil && r.Root != cfg.Root {
		// The socket belongs to a daemon with another root.
		return snapshotter.InspectRoot(c.ctx, cfg.Root)
	}
	return r, err
}

func inspectLive(ctx context.Context, socket string) (r snapshotter.Report, err error) {
	client := http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives: true,
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://admin"+inspectPath, nil)
	if err != nil {
		return r, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return r, fmt.Errorf("ask the daemon: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		return r, fmt.Errorf("ask the daemon: %s: %s", resp.Status, text)
	}
	return r, json.NewDecoder(resp.Body).Decode(&r)
}

func printReport(w io.Writer, r snapshotter.Report) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintf(t, "SNAPSHOTS of %s\nID\tKIND\tINODES\tSIZE\tNAME\tPARENT\n", r.Root)
	for _, s := range r.Snapshots {
		fmt.Fprintf(t, "%d\t%s\t%d\t%d\t%s\t%s\n", s.ID, s.Kind, s.Inodes, s.Size, s.Name, s.Parent)
	}
	fmt.Fprint(t, "\nOPEN\nID\tSTARTED\tEXTRACTION\tSTATE\tKEY\n")
	for _, e := range r.Journal.Open {
		state := "open"
		switch {
		case e.Poisoned != "":
			state = "refused: " + e.Poisoned
		case !e.Abandoned.IsZero():
			state = "closed by a restart"
		case e.CursorLost:
			state = "cursor lost"
		}
		fmt.Fprintf(t, "%d\t%s\t%t\t%s\t%s\n", e.ID, e.Started.Format(time.RFC3339), e.Extraction, state, e.Key)
	}
	fmt.Fprint(t, "\nCOMMITTED\nSEQUENCE\tID\tTIME\tSTRATEGY\tENTRIES\tBYTES\tNAME\n")
	for _, e := range r.Journal.Committed {
		fmt.Fprintf(t, "%d\t%d\t%s\t%s\t%d\t%d\t%s\n", e.Sequence, e.ID, e.Time.Format(time.RFC3339), e.Strategy, e.Entries, e.Bytes, e.Name)
	}
	fmt.Fprint(t, "\nREMOVED\nSEQUENCE\tID\tCOMMITTED\tREMOVED\tNAME\n")
	for _, e := range r.Journal.History {
		fmt.Fprintf(t, "%d\t%d\t%s\t%s\t%s\n", e.Sequence, e.ID, e.Time.Format(time.RFC3339), e.Removed.Format(time.RFC3339), e.Name)
	}
	return t.Flush()
}
