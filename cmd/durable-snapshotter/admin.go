package main

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"time"

	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layers"
	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
)

// The paths of admin.sock. Requests and answers are JSON.
const (
	inspectPath = "/v1/inspect" // GET: snapshotter.Report
	repairPath  = "/v1/repair"  // POST layers.RepairOptions: []layers.RepairResult
)

// serveAdmin serves HTTP on admin.sock, for operators and monitoring.
func serveAdmin(ctx context.Context, cfg Config, sn *snapshotter.Snapshotter) (*http.Server, error) {
	l, err := listen(ctx, adminSocket(cfg.Address))
	if err != nil {
		return nil, err
	}
	server := &http.Server{
		Handler: adminHandler(sn), ReadHeaderTimeout: 10 * time.Second,
		BaseContext: func(net.Listener) context.Context { return ctx }, // a stop cancels requests
	}
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
		var o layers.RepairOptions
		d := json.NewDecoder(http.MaxBytesReader(w, r.Body, 16<<20))
		d.DisallowUnknownFields()
		if err := d.Decode(&o); err != nil {
			http.Error(w, "repair: "+err.Error(), http.StatusBadRequest)
			return
		}
		results, err := sn.Layers().Repair(r.Context(), o)
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
