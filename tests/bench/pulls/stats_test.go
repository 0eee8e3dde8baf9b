package pulls

import (
	"math"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/published"
)

// sample is a report of two variants whose figures are easy to compute: the machine is twice as
// slow in round 2, for both.
func sample() *Report {
	r := &Report{
		Origin: published.Origin{
			Schema: schema, Time: time.Unix(1_800_000_000, 0).UTC(), Command: "bench run", Revision: strings.Repeat("ab", 20), Containerd: "2.4.2",
			Machine: published.Machine{CPU: "a <processor> & more", Cores: 2, Memory: 8 << 30, Kernel: "6.18"},
		},
		FS: "ext4", Disk: "fast", Rounds: 3, Scale: 1,
	}
	s := Setting{Image: "golang", Unpacks: 1}
	for round, seconds := range [][2]float64{{2, 1}, {4, 2.4}, {2, 1.4}} {
		for i, name := range []string{"overlayfs", "durable"} {
			p := Pull{Setting: s, Round: round + 1, Variant: name, Seconds: seconds[i], CPU: seconds[i] / 2, Writes: 10, Bytes: 20 << 20, Flushes: 3, ContainerdMemory: 50 << 20}
			if name == "durable" {
				p.DaemonMemory = 30 << 20
				p.Commits = &Histogram{Count: 4, Seconds: 0.04, Buckets: []Bucket{{0.005, 1}, {0.01, 3}, {0.025, 4}}}
			}
			r.Pulls = append(r.Pulls, p)
		}
	}
	return r
}

// TestMedianOfRatios: ratios are within a round. The quotient of the medians would be 0.70.
func TestMedianOfRatios(t *testing.T) {
	rows := sample().Rows()
	if len(rows) != 2 || rows[0].Variant != "overlayfs" || rows[1].Variant != "durable" {
		t.Fatalf("rows %v", rows)
	}
	if got := rows[1].Ratio; math.Abs(got.Median-0.6) > 1e-9 || math.Abs(got.Q1-0.55) > 1e-9 || math.Abs(got.Q3-0.65) > 1e-9 {
		t.Errorf("ratio %v, want 0.55, 0.6, 0.65", got)
	}
	if got := rows[1].Seconds.Median; got != 1.4 {
		t.Errorf("median of seconds %v, want 1.4", got)
	}
	if got := rows[0].Ratio.Median; got != 1 {
		t.Errorf("overlayfs has the ratio %v to itself", got)
	}
}

// TestMissingBase: without overlayfs in the round there is no ratio.
func TestMissingBase(t *testing.T) {
	r := sample()
	r.Pulls = r.Pulls[1:2]
	if got := r.Rows()[0].Ratio.Median; !math.IsNaN(got) {
		t.Errorf("ratio %v, want none", got)
	}
}

// TestCompare: a difference in each of ten rounds is one, and noise is none.
func TestCompare(t *testing.T) {
	r := &Report{Base: "cd"}
	for round := range 10 {
		noise := float64(round*7%10) / 100
		for name, seconds := range map[string]float64{
			"durable": 1 + noise, "durable@base": 2 + noise,
			"durable-differ": 1 + noise, "durable-differ@base": 1.09 - noise,
		} {
			r.Pulls = append(r.Pulls, Pull{Setting: Setting{Image: "tiny", Unpacks: 1}, Round: round, Variant: name, Seconds: seconds})
		}
	}
	all := r.Compare()
	if len(all) != 2 || all[0].Variant != "durable" || all[1].Variant != "durable-differ" {
		t.Fatalf("compared %v", all)
	}
	if c := all[0]; c.Delta == "~" || !strings.HasPrefix(c.Delta, "-") || math.Abs(c.Ratio.Median-0.51) > 0.01 {
		t.Errorf("half of the time: %+v", c)
	}
	if c := all[1]; c.Delta != "~" {
		t.Errorf("noise: %+v", c)
	}
	if text := r.CompareTable(); strings.Count(text, "\n| tiny |") != 2 {
		t.Errorf("the table lacks a row:\n%s", text)
	}
}

func TestLatency(t *testing.T) {
	var all []float64
	for i := range 200 {
		all = append(all, float64(200-i))
	}
	if got, want := *LatencyOf(all), (Latency{Count: 200, P50: 101, P99: 199, Max: 200}); got != want {
		t.Errorf("latency %v, want %v", got, want)
	}
	if LatencyOf(nil) != nil {
		t.Error("the latency of nothing is something")
	}
}

func TestParseStat(t *testing.T) {
	got, err := parseStat("  1 2 3 4  50 6 16 8 9 10 11 12 13 14 15 7 17\n")
	if want := (traffic{read: 3 * 512, writes: 50, bytes: 16 * 512, flushes: 7}); err != nil || got != want {
		t.Errorf("%v, %v, want %v", got, err, want)
	}
	if _, err := parseStat("1 2 3"); err == nil {
		t.Error("a line of three fields is accepted")
	}
}

func TestSaveLoad(t *testing.T) {
	r, file := sample(), filepath.Join(t.TempDir(), "r.json")
	if err := r.Save(file); err != nil {
		t.Fatal(err)
	}
	back, err := Load(file)
	if err != nil || !reflect.DeepEqual(r, back) {
		t.Errorf("%v, %+v, want %+v", err, back, r)
	}
	r.Schema++
	if err := r.Save(file); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(file); err == nil {
		t.Error("a report of another schema is read")
	}
}

// TestProof: what is not as slow as it is to be is refused, and what is slower.
func TestProof(t *testing.T) {
	for p, ok := range map[Proof]bool{
		{Bytes: 39e6, Requests: 990}:   true,
		{Bytes: 43e6, Requests: 1050}:  true,
		{Bytes: 2.8e9, Requests: 990}:  false,
		{Bytes: 39e6, Requests: 20000}: false,
		{Bytes: 3e6, Requests: 990}:    false,
	} {
		if err := p.check(Disks["emmc"]); (err == nil) != ok {
			t.Errorf("%+v: %v", p, err)
		}
	}
	if err := (Proof{Bytes: 2.8e9, Requests: 90000}).check(Disks["fast"]); err != nil {
		t.Error(err)
	}
}
