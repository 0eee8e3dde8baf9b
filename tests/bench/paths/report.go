package paths

import (
	"fmt"
	"strings"

	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/published"
)

// Schema is the version of Report. A field that changes its meaning needs another one.
const Schema = 101

// The variants.
const (
	Durable   = "durable"
	Overlayfs = "overlayfs"
)

// Report is one run.
type Report struct {
	published.Origin
	FS     string  `json:"fs"`
	Rounds int     `json:"rounds"` // of each call, and a tenth of them of Walk
	Calls  []Call  `json:"calls"`
	Starts []Start `json:"starts"`
}

// Call is what one call took, in seconds.
type Call struct {
	Snapshots int     `json:"snapshots"` // that the snapshotter has
	Depth     int     `json:"depth"`     // length of the chain that the call is about; 0: of none
	Op        string  `json:"op"`
	Variant   string  `json:"variant"`
	Count     int     `json:"count"`
	Q1        float64 `json:"q1"`
	Median    float64 `json:"median"`
	Q3        float64 `json:"q3"`
	P99       float64 `json:"p99"`
	CPU       float64 `json:"cpu,omitempty"` // processor time of the process, of each; of Walk only
}

// Start is one start of a snapshotter with nothing of it in memory.
type Start struct {
	Snapshots int     `json:"snapshots"`
	Variant   string  `json:"variant"`
	Unclean   bool    `json:"unclean"` // the machine went down under it before
	Socket    float64 `json:"socket"`  // seconds from the start of the process until its socket answers
	Stat      float64 `json:"stat"`    // until the first Stat after that was answered, of a layer on a chain of ten
	// Memory is what is resident after that Stat, and Private the part of it that is no page of a
	// file (VmRSS and RssAnon of proc_pid_status(5)), in bytes.
	Memory  int64 `json:"memory"`
	Private int64 `json:"private"`
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
	fmt.Fprintf(&b, "%s, %d calls of each kind; %s\n", r.FS, r.Rounds, r.Origin)
	var lines [][]string
	for _, c := range r.Calls {
		o := r.other(c)
		if c.Variant != Durable || o == nil {
			continue
		}
		depth := "–"
		if c.Depth > 0 {
			depth = fmt.Sprint(c.Depth)
		}
		slower := "–"
		if least := r.fewest(c); least != nil && least.Snapshots != c.Snapshots {
			slower = published.Number(c.Median/least.Median, 2)
		}
		lines = append(lines, []string{
			c.Op, fmt.Sprint(c.Snapshots), depth, micros(c.Median), micros(o.Median), published.Number(c.Median/o.Median, 2), slower, micros(c.P99), micros(o.P99),
		})
	}
	published.Table(&b, []string{"call", "snapshots", "depth", "durable µs", "overlayfs µs", "/ overlayfs", "/ fewest snapshots", "durable p99", "overlayfs p99"}, lines)
	lines = nil
	for _, c := range r.Calls {
		if o := r.other(c); c.Variant == Durable && o != nil && c.CPU > 0 {
			lines = append(lines, []string{fmt.Sprint(c.Snapshots), published.Number(c.CPU*1000, 1), published.Number(o.CPU*1000, 1), published.Number(c.CPU/pollEvery*100, 2)})
		}
	}
	published.Table(&b, []string{"snapshots", "CPU of a Walk: durable ms", "overlayfs ms", "% of a core, every 10 s"}, lines)
	lines = nil
	type key struct {
		snapshots int
		variant   string
		unclean   bool
	}
	starts, order := map[key][]Start{}, []key{}
	for _, s := range r.Starts {
		k := key{s.Snapshots, s.Variant, s.Unclean}
		if starts[k] == nil {
			order = append(order, k)
		}
		starts[k] = append(starts[k], s)
	}
	for _, k := range order {
		after := "a stop"
		if k.unclean {
			after = "a power cut"
		}
		middle := func(figure func(Start) float64) float64 {
			var all []float64
			for _, s := range starts[k] {
				all = append(all, figure(s))
			}
			return published.SpreadOf(all).Median
		}
		lines = append(lines, []string{
			fmt.Sprint(k.snapshots), k.variant, after, published.Number(middle(func(s Start) float64 { return s.Socket }), 2), published.Number(middle(func(s Start) float64 { return s.Stat * 1000 }), 1),
			published.Number(middle(func(s Start) float64 { return float64(s.Memory) / (1 << 20) }), 0), published.Number(middle(func(s Start) float64 { return float64(s.Private) / (1 << 20) }), 0),
		})
	}
	published.Table(&b, []string{"snapshots", "snapshotter", "cold start after", "socket answers after s", "first Stat ms", "resident MiB", "of them private"}, lines)
	return b.String()
}

// pollEvery is how often the CRI plugin walks over all snapshots, in seconds
// (stats_collect_period of its configuration).
const pollEvery = 10

func micros(seconds float64) string { return published.Number(seconds*1e6, 0) }

// other is the same call with overlayfs.
func (r *Report) other(c Call) *Call {
	return r.find(func(o Call) bool {
		return o.Op == c.Op && o.Snapshots == c.Snapshots && o.Depth == c.Depth && o.Variant == Overlayfs
	})
}

// fewest is the same call with the fewest snapshots.
func (r *Report) fewest(c Call) *Call {
	return r.find(func(o Call) bool { return o.Op == c.Op && o.Depth == c.Depth && o.Variant == c.Variant })
}

func (r *Report) find(is func(Call) bool) *Call {
	for i, c := range r.Calls {
		if is(c) {
			return &r.Calls[i]
		}
	}
	return nil
}
