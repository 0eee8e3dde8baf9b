package boot

import (
	"fmt"
	"slices"
	"strings"

	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/published"
	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/pulls"
)

// Schema is the version of Report. A field that changes its meaning needs another one.
const Schema = 301

// The variants.
const (
	Cut       = "durable, after a power cut"
	Stop      = "durable, after a stop"
	Overlayfs = "overlayfs"
)

var variants = []string{Cut, Stop, Overlayfs}

// Report is one run.
type Report struct {
	published.Origin
	FS     string `json:"fs"`
	Disk   string `json:"disk"` // its kind, see pulls.Disks
	Rounds int    `json:"rounds"`
	Boots  []Boot `json:"boots"`
}

// Boot is one start. Times are in seconds from the start of the process.
type Boot struct {
	Layers  int     `json:"layers"`
	Entries int64   `json:"entries"` // of all layers
	Variant string  `json:"variant"`
	Socket  float64 `json:"socket"` // its socket answers
	Pause   float64 `json:"pause"`  // a container can be prepared on the pause image
	Pod     float64 `json:"pod"`    // and on one more image
	Pods    float64 `json:"pods"`   // and on three more, one after another
	Images  float64 `json:"images"` // Stat has answered for the top of each image, asked for all at once
	// Verified is when no layer is unverified any more; 0 where nothing is to be verified.
	Verified float64 `json:"verified"`
	Read     int64   `json:"read"` // bytes that the disk has read until Verified, or Images
	// Fdatasync is what a process has that writes 4 KiB and syncs them every 5 ms, as a
	// database does, from the start until Verified, or Images.
	Fdatasync *pulls.Latency `json:"fdatasync"`
}

// Save writes a report.
func (r *Report) Save(file string) error { return published.Save(file, r) }

// Load reads a report.
func Load(file string) (*Report, error) {
	r := &Report{}
	return r, published.Load(file, Schema, r)
}

// Table is a report as Markdown: medians.
func (r *Report) Table() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s on a disk of kind `%s`, %d boots of each kind; %s\n", r.FS, r.Disk, r.Rounds, r.Origin)
	var sizes []int
	for _, boot := range r.Boots {
		if !slices.Contains(sizes, boot.Layers) {
			sizes = append(sizes, boot.Layers)
		}
	}
	var lines [][]string
	for _, layers := range sizes {
		for _, variant := range variants {
			if line := r.line(layers, variant); line != nil {
				lines = append(lines, line)
			}
		}
	}
	published.Table(&b, []string{
		"layers", "entries", "snapshotter", "socket answers after s", "pause image", "first image", "first three", "all images", "all verified", "MiB read", "fdatasync ms: p50", "p99", "max",
	}, lines)
	return b.String()
}

// line is nil when there was no such boot.
func (r *Report) line(layers int, variant string) []string {
	var all []Boot
	for _, boot := range r.Boots {
		if boot.Layers == layers && boot.Variant == variant {
			all = append(all, boot)
		}
	}
	if all == nil {
		return nil
	}
	median := func(figure func(Boot) float64) float64 {
		var values []float64
		for _, boot := range all {
			values = append(values, figure(boot))
		}
		return published.SpreadOf(values).Median
	}
	line := []string{fmt.Sprint(layers), fmt.Sprint(all[0].Entries), variant}
	for _, figure := range []func(Boot) float64{
		func(b Boot) float64 { return b.Socket }, func(b Boot) float64 { return b.Pause },
		func(b Boot) float64 { return b.Pod }, func(b Boot) float64 { return b.Pods },
		func(b Boot) float64 { return b.Images }, func(b Boot) float64 { return b.Verified },
	} {
		text := "–"
		if seconds := median(figure); seconds > 0 {
			text = published.Number(seconds, 2)
		}
		line = append(line, text)
	}
	line = append(line, published.Number(median(func(b Boot) float64 { return float64(b.Read) })/(1<<20), 0))
	for _, figure := range []func(*pulls.Latency) float64{
		func(l *pulls.Latency) float64 { return l.P50 }, func(l *pulls.Latency) float64 { return l.P99 },
	} {
		line = append(line, published.Number(median(func(b Boot) float64 { return figure(b.Fdatasync) })*1000, 2))
	}
	most := 0.0
	for _, boot := range all {
		most = max(most, boot.Fdatasync.Max)
	}
	return append(line, published.Number(most*1000, 2))
}
