// Package metrics has the metrics of this process. The packages that do the work count in them,
// and the daemon serves [Registry].
//
// The names follow Prometheus: seconds, bytes, _total for what only grows. No label has a
// digest, a key or the name of an image as its value: there would be one series for each.
package metrics

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// Prefix begins the names of all metrics but those of gRPC, of Go and of the process.
const Prefix = "durable_snapshotter_"

// Registry has all metrics of the process.
var Registry = func() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}()

var factory = promauto.With(Registry)

// durations are the buckets of what takes milliseconds to a minute.
var durations = []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}

// The phases of a Commit, and of an Apply.
const (
	PhaseExtract     = "extract"     // the layer is written
	PhaseSeal        = "seal"        // its tree is walked and sealed
	PhaseWalk        = "walk"        // the tree is walked and sealed
	PhaseSync        = "sync"        // what was written becomes durable
	PhaseTransaction = "transaction" // the row is written, and durable
)

// The results of an operation.
const (
	OK       = "ok"
	Failed   = "error"
	Refused  = "refused"   // of a Commit: by a rule, and not by a failure
	Damaged  = "damaged"   // of a verification
	NoBlob   = "no_blob"   // of a heal: nothing on this node has good bytes
	Stopped  = "stopped"   // of a heal: too much is damaged at once
	HandedOn = "handed_on" // of an Apply: to containerd's own diff service
)

var (
	// Commits counts Commits by their results.
	Commits = factory.NewCounterVec(counter("commits_total", "Commits of snapshots, by result: ok, refused, error."), []string{"result"})
	// CommitSeconds is how long Commits took.
	CommitSeconds = factory.NewHistogram(histogram("commit_duration_seconds", "Duration of Commits. containerd's metadata is locked meanwhile."))
	// CommitPhaseSeconds is the same for each phase.
	CommitPhaseSeconds = factory.NewHistogramVec(histogram("commit_phase_duration_seconds", "Duration of the phases of Commits: walk, sync, transaction."), []string{"phase"})
	// CommitBytes and CommitInodes count what was committed.
	CommitBytes  = factory.NewCounter(counter("commit_bytes_total", "Bytes of the files of committed snapshots."))
	CommitInodes = factory.NewCounter(counter("commit_inodes_total", "Inodes of committed snapshots."))
	// QuickCommits counts Commits of what an Apply of ours had made durable before.
	QuickCommits = factory.NewCounter(counter("quick_commits_total", "Commits that did not sync the file system, because the layer was durable before."))
	// Applies counts layers that a client requested to be extracted, by result.
	Applies = factory.NewCounterVec(counter("applies_total", "Layers that were to be extracted, by result: ok, handed_on, error."), []string{"result"})
	// ApplySeconds is how long extractions of ours took, ApplyPhaseSeconds the same for each phase.
	ApplySeconds      = factory.NewHistogram(histogram("apply_duration_seconds", "Duration of extractions of layers."))
	ApplyPhaseSeconds = factory.NewHistogramVec(histogram("apply_phase_duration_seconds", "Duration of the phases of extractions: extract, seal, sync."), []string{"phase"})
	// ApplyBytes counts the bytes of the tars that were extracted.
	ApplyBytes = factory.NewCounterVec(counter("apply_bytes_total", "Bytes of the tars of extracted layers, by decompressor: igzip, internal."), []string{"decompressor"})
	// ApplySyncs counts how extracted layers, and those of heals, were made durable.
	ApplySyncs = factory.NewCounterVec(counter("apply_syncs_total", "Syncs of extracted and healed layers: syncfs, of the file system, or files, of their own files alone."), []string{"sync"})
	// SyncErrors counts the writes that the kernel could not make durable.
	SyncErrors = factory.NewCounter(counter("sync_errors_total", "Syncs and database transactions that failed."))
	// Writable is whether the file system of the root accepts writes.
	Writable = factory.NewGauge(gauge("filesystem_writable", "1 when the file system of the root accepts writes, 0 after one has failed."))

	// Verifications counts verifications of layers by depth and result.
	Verifications = factory.NewCounterVec(counter("verifications_total", "Verifications of layers, by depth (metadata, content) and result (ok, damaged, error)."), []string{"depth", "result"})
	// VerificationSeconds is how long they took.
	VerificationSeconds = factory.NewHistogramVec(histogram("verification_duration_seconds", "Duration of verifications of layers, by depth."), []string{"depth"})
	// Heals counts attempts to heal a layer by their results.
	Heals = factory.NewCounterVec(counter("heals_total", "Attempts to heal damaged layers, by result: ok, no_blob, stopped, error."), []string{"result"})
	// HealSeconds is how long the successful ones took.
	HealSeconds = factory.NewHistogram(histogram("heal_duration_seconds", "Duration of successful heals."))
	// Adopted counts extractions that ended in a layer that was there already.
	Adopted = factory.NewCounter(counter("adopted_layers_total", "Commits that found the same layer committed already."))
	// ScrubCompleted is the end of the last round of verification.
	ScrubCompleted = factory.NewGauge(gauge("scrub_last_completed_timestamp_seconds", "Unix time of the end of the last round of periodic verification, 0 before the first."))

	// Fetches counts blobs that containerd was requested to fetch.
	Fetches = factory.NewCounterVec(counter("blob_fetches_total", "Blobs of damaged layers that containerd was requested to fetch, by result: ok, error."), []string{"result"})
	// Drops counts layers that containerd was made to forget, ImagesDropped the names of their images.
	Drops         = factory.NewCounter(counter("layers_dropped_total", "Damaged layers that containerd was made to forget."))
	ImagesDropped = factory.NewCounter(counter("images_dropped_total", "Names of images that were deleted with damaged layers."))
	// ContainerdReachable is whether containerd's socket can be reached.
	ContainerdReachable = factory.NewGauge(gauge("containerd_reachable", "1 when the daemon is connected to containerd's socket."))

	// RecoverySeconds, RecoveryActions and ShutdownClean are about the last start.
	RecoverySeconds = factory.NewGauge(gauge("recovery_duration_seconds", "Duration of the recovery at the last start."))
	RecoveryActions = factory.NewGaugeVec(gauge("recovery_actions", "What the recovery at the last start did: replayed, closed, removed, unverified."), []string{"action"})
	ShutdownClean   = factory.NewGauge(gauge("last_shutdown_clean", "0 when the machine went down under the daemon before the last start."))

	// Build has the value 1, and labels with what this program was built from.
	Build = factory.NewGaugeVec(gauge("build_info", "1; the version, the revision and the Go version are labels."), []string{"version", "revision", "go_version"})

	// Handled and HandlingSeconds have the names of go-grpc-middleware.
	Handled         = factory.NewCounterVec(prometheus.CounterOpts{Name: "grpc_server_handled_total", Help: "Calls of gRPC that were answered, by method and code."}, []string{"grpc_method", "grpc_code"})
	HandlingSeconds = factory.NewHistogramVec(prometheus.HistogramOpts{Name: "grpc_server_handling_seconds", Help: "Duration of calls of gRPC, by method.", Buckets: durations}, []string{"grpc_method"})
)

func counter(name, help string) prometheus.CounterOpts {
	return prometheus.CounterOpts{Name: Prefix + name, Help: help}
}

func gauge(name, help string) prometheus.GaugeOpts {
	return prometheus.GaugeOpts{Name: Prefix + name, Help: help}
}

func histogram(name, help string) prometheus.HistogramOpts {
	return prometheus.HistogramOpts{Name: Prefix + name, Help: help, Buckets: durations}
}

// Since observes the time since began.
func Since(o prometheus.Observer, began time.Time) { o.Observe(time.Since(began).Seconds()) }

// Set makes a gauge 1 or 0.
func Set(g prometheus.Gauge, is bool) {
	g.Set(map[bool]float64{true: 1}[is])
}
