// Package admin serves HTTP for operators and monitoring: health, metrics, and what the
// snapshotter has on record, as JSON. docs/openapi.yaml describes it.
package admin

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/pprof"
	"runtime"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/durable-snapshotter/durable-snapshotter/internal/imagecheck"
	"github.com/durable-snapshotter/durable-snapshotter/internal/images"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layers"
	"github.com/durable-snapshotter/durable-snapshotter/internal/metrics"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
)

// The paths. Requests and answers are JSON, except where noted.
const (
	HealthPath    = "/healthz"      // GET: text; 503 when the file system does not accept writes
	ReadyPath     = "/readyz"       // GET: text; 503 also before the daemon serves containerd
	MetricsPath   = "/metrics"      // GET: Prometheus text format
	SnapshotsPath = "/v1/snapshots" // GET: Snapshots
	ImagesPath    = "/v1/images"    // GET, with namespace= and image=, each any number of times: []images.Image
	JournalPath   = "/v1/journal"   // GET: snapshotter.JournalReport
	InspectPath   = "/v1/inspect"   // GET: snapshotter.Report
	RepairPath    = "/v1/repair"    // POST layers.RepairOptions: []layers.RepairResult
)

// maxRequest bounds the body of a request, in bytes.
const maxRequest = 16 << 20

// Config configures a Server.
type Config struct {
	Images imagecheck.Config
	Pprof  bool // serve /debug/pprof/
}

// Snapshots is what GET /v1/snapshots answers.
type Snapshots struct {
	Root      string                       `json:"root"`
	Snapshots []snapshotter.SnapshotReport `json:"snapshots"`
	Layers    []verify.Result              `json:"layers"`
	Brake     string                       `json:"brake,omitempty"`
}

// Server answers requests about one snapshotter.
type Server struct {
	cfg     Config
	sn      *snapshotter.Snapshotter
	serving atomic.Bool
	states  *states
}

// New returns a server, and registers the metrics that are read from the snapshotter when they
// are requested. Close ends that.
func New(cfg Config, sn *snapshotter.Snapshotter) *Server {
	if cfg.Pprof {
		// Otherwise the profiles block and mutex are empty: one sample for each 10 µs of
		// waiting, and for each 100 waits for a mutex.
		runtime.SetBlockProfileRate(10_000)
		runtime.SetMutexProfileFraction(100)
	}
	s := &Server{cfg: cfg, sn: sn, states: newStates(sn)}
	metrics.Registry.MustRegister(s.states)
	return s
}

// Close unregisters the metrics.
func (s *Server) Close() { metrics.Registry.Unregister(s.states) }

// Serving notes that the daemon serves containerd.
func (s *Server) Serving() { s.serving.Store(true) }

// Handler answers everything.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+HealthPath, func(w http.ResponseWriter, r *http.Request) { s.health(w, r, true) })
	mux.HandleFunc("GET "+ReadyPath, func(w http.ResponseWriter, r *http.Request) { s.health(w, r, s.serving.Load()) })
	mux.Handle("GET "+MetricsPath, MetricsHandler())
	mux.HandleFunc("GET "+InspectPath, func(w http.ResponseWriter, r *http.Request) {
		report, err := s.sn.Inspect(r.Context())
		reply(w, report, err)
	})
	mux.HandleFunc("GET "+SnapshotsPath, func(w http.ResponseWriter, r *http.Request) {
		report, err := s.sn.Inspect(r.Context())
		reply(w, Snapshots{report.Root, report.Snapshots, report.Layers, report.Brake}, err)
	})
	mux.HandleFunc("GET "+JournalPath, func(w http.ResponseWriter, r *http.Request) {
		report, err := s.sn.Inspect(r.Context())
		reply(w, report.Journal, err)
	})
	mux.HandleFunc("GET "+ImagesPath, s.images)
	mux.HandleFunc("POST "+RepairPath, s.repair)
	if s.cfg.Pprof {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	return mux
}

// MetricsHandler answers with all metrics of the process. When some cannot be read, as from a
// database on a disk that fails, the others are there all the same.
func MetricsHandler() http.Handler {
	return promhttp.HandlerFor(metrics.Registry, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError})
}

// health answers 200 when ready is true and the file system accepts writes.
func (s *Server) health(w http.ResponseWriter, r *http.Request, ready bool) {
	if !ready {
		http.Error(w, "the daemon does not serve containerd yet", http.StatusServiceUnavailable)
		return
	}
	if err := s.sn.Healthy(r.Context()); err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	_, _ = w.Write([]byte("ok\n"))
}

func (s *Server) images(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	found, err := imagecheck.Check(r.Context(), s.cfg.Images, s.sn, images.Options{Namespaces: q["namespace"], Names: q["image"]})
	if errors.Is(err, images.ErrNotFound) {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	reply(w, found, err)
}

func (s *Server) repair(w http.ResponseWriter, r *http.Request) {
	var o layers.RepairOptions
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest))
	d.DisallowUnknownFields()
	if err := d.Decode(&o); err != nil {
		http.Error(w, "repair: "+err.Error(), http.StatusBadRequest)
		return
	}
	results, err := s.sn.Layers().Repair(r.Context(), o)
	reply(w, results, err)
}

func reply(w http.ResponseWriter, answer any, err error) {
	if errors.Is(err, context.Canceled) {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(answer) // an error means that the client has gone
}
