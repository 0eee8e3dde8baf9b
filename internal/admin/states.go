package admin

import (
	"context"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/metrics"
	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// readWithin bounds a collection.
const readWithin = 10 * time.Second

// states are the metrics that are read from the snapshotter, and from its file system, when they
// are requested.
type states struct {
	sn                                 *snapshotter.Snapshotter
	layers, snapshots, journal, brake  *prometheus.Desc
	database, size, available, noFiles *prometheus.Desc
}

func newStates(sn *snapshotter.Snapshotter) *states {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(metrics.Prefix+name, help, labels, nil)
	}
	return &states{
		sn:        sn,
		layers:    desc("layers", "Committed layers, by state: ready, unverified, damaged, healing.", "state"),
		snapshots: desc("snapshots", "Snapshots, by kind: active, view, committed.", "kind"),
		journal:   desc("journal_entries", "Entries of the commit journal, by kind: open, committed, removed.", "kind"),
		brake:     desc("mending_stopped", "1 when too much is damaged at once, and mending waits for an operator."),
		database:  desc("metadata_db_bytes", "Size of metadata.db."),
		size:      desc("filesystem_size_bytes", "Size of the file system of the root."),
		available: desc("filesystem_avail_bytes", "Bytes of it that can be written."),
		noFiles:   desc("filesystem_files_free", "Free inodes of it; 0 where it has no fixed number."),
	}
}

// Describe implements prometheus.Collector.
func (s *states) Describe(to chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{s.layers, s.snapshots, s.journal, s.brake, s.database, s.size, s.available, s.noFiles} {
		to <- d
	}
}

// Collect implements prometheus.Collector.
func (s *states) Collect(to chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		to <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	ctx, cancel := context.WithTimeout(context.Background(), readWithin)
	defer cancel()
	if r, err := s.sn.Inspect(ctx); err != nil {
		to <- prometheus.NewInvalidMetric(s.layers, err)
	} else {
		states := map[storage.State]int{storage.StateReady: 0, storage.StateUnverified: 0, storage.StateDamaged: 0, storage.StateHealing: 0}
		for _, l := range r.Layers {
			states[l.State]++
		}
		for state, n := range states {
			gauge(s.layers, float64(n), string(state))
		}
		kinds := map[string]int{"active": 0, "view": 0, "committed": 0}
		for _, sn := range r.Snapshots {
			kinds[sn.Kind]++
		}
		for kind, n := range kinds {
			gauge(s.snapshots, float64(n), kind)
		}
		gauge(s.journal, float64(len(r.Journal.Open)), "open")
		gauge(s.journal, float64(len(r.Journal.Committed)), "committed")
		gauge(s.journal, float64(len(r.Journal.History)), "removed")
		stopped := 0.0
		if r.Brake != "" {
			stopped = 1
		}
		gauge(s.brake, stopped)
	}
	root := s.sn.Root()
	if st, err := os.Stat(filepath.Join(root, storage.FileName)); err == nil {
		gauge(s.database, float64(st.Size()))
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(root, &fs); err == nil {
		block := float64(fs.Bsize)
		gauge(s.size, float64(fs.Blocks)*block)
		gauge(s.available, float64(fs.Bavail)*block)
		gauge(s.noFiles, float64(fs.Ffree))
	}
}
