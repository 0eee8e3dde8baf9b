package layers

import (
	"fmt"
	"strings"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/published"
	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/pulls"
)

// Schema is the version of Report. A field that changes its meaning needs another one.
const Schema = 202

// Report is one run.
type Report struct {
	published.Origin
	FS       string `json:"fs"`
	Neighbor int64  `json:"neighbor"` // bytes a second that it was to write to its pages
	Rounds   int    `json:"rounds"`
	Chain    int    `json:"chain"` // layers of a chain, of which each round has one
	Rows     []Row  `json:"rows"`
}

// Row is what all layers with one setting of sync took, in seconds.
type Row struct {
	Sync   fsync.Mode    `json:"sync"`
	Rate   float64       `json:"rate,omitempty"` // what the neighbor wrote in bytes a second, in the mean; 0: there was none
	Apply  pulls.Latency `json:"apply"`
	Synced pulls.Latency `json:"synced"` // the part of it that is the sync
	Commit pulls.Latency `json:"commit"`
	Flush  pulls.Latency `json:"flush"` // of one page by fdatasync(2), after each Commit
}

// add adds the layers of a setting, if there are any.
func (r *Report) add(s fsync.Mode, beside bool, all []layer) {
	if len(all) == 0 {
		return
	}
	of := func(figure func(layer) float64) pulls.Latency {
		var values []float64
		for _, l := range all {
			values = append(values, figure(l))
		}
		return *pulls.LatencyOf(values)
	}
	row := Row{
		Sync: s, Apply: of(func(l layer) float64 { return l.apply }), Synced: of(func(l layer) float64 { return l.sync }),
		Commit: of(func(l layer) float64 { return l.commit }), Flush: of(func(l layer) float64 { return l.flush }),
	}
	if beside {
		for _, l := range all {
			row.Rate += l.rate / float64(len(all))
		}
	}
	r.Rows = append(r.Rows, row)
}

// Save writes a report.
func (r *Report) Save(file string) error { return published.Save(file, r) }

// Load reads a report.
func Load(file string) (*Report, error) {
	r := &Report{}
	return r, published.Load(file, Schema, r)
}

// Table is a report as Markdown.
func (r *Report) Table() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s, %d layers of 3 MiB and 420 entries with each setting; %s\n", r.FS, r.Rounds*r.Chain, r.Origin)
	var lines [][]string
	for _, row := range r.Rows {
		neighbor := "–"
		if row.Rate > 0 {
			neighbor = published.Number(row.Rate/1e6, 0)
		}
		line := []string{string(row.Sync), neighbor}
		for _, l := range []pulls.Latency{row.Commit, row.Flush, row.Synced, row.Apply} {
			for _, seconds := range []float64{l.P50, l.P99, l.Max} {
				line = append(line, published.Number(seconds*1000, 1))
			}
		}
		lines = append(lines, line)
	}
	published.Table(&b, []string{
		"sync", "neighbor MB/s", "Commit ms: p50", "p99", "max", "one fdatasync ms: p50", "p99", "max", "sync of Apply ms: p50", "p99", "max", "Apply ms: p50", "p99", "max",
	}, lines)
	return b.String()
}
