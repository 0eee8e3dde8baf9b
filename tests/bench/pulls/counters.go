package pulls

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	dto "github.com/prometheus/client_model/go"

	"github.com/durable-snapshotter/durable-snapshotter/internal/metrics"
)

// resetPeak sets the most resident memory of a process to what it has now (proc_pid_clear_refs(5)).
func resetPeak(pid int) error {
	return os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0)
}

// traffic counts what was read from a block device, and written to it.
type traffic struct{ read, writes, bytes, flushes int64 }

func (t traffic) since(before traffic) traffic {
	return traffic{t.read - before.read, t.writes - before.writes, t.bytes - before.bytes, t.flushes - before.flushes}
}

// BytesRead is how much was read from a block device, such as /dev/loop0.
func BytesRead(device string) (int64, error) {
	t, err := counted(device)
	return t.read, err
}

// counted reads the counters of a block device, such as /dev/loop0.
func counted(device string) (traffic, error) {
	file := filepath.Join("/sys/block", filepath.Base(device), "stat")
	text, err := os.ReadFile(file)
	if err != nil {
		return traffic{}, err
	}
	t, err := parseStat(string(text))
	if err != nil {
		return traffic{}, fmt.Errorf("%s: %w", file, err)
	}
	return t, nil
}

// parseStat reads a line as in the kernel's Documentation/block/stat.rst.
func parseStat(text string) (traffic, error) {
	fields := strings.Fields(text)
	if len(fields) < 17 {
		return traffic{}, fmt.Errorf("%d fields: Linux 5.5 or newer is needed", len(fields))
	}
	const sector = 512
	var t traffic
	for i, to := range map[int]*int64{2: &t.read, 4: &t.writes, 6: &t.bytes, 15: &t.flushes} {
		n, err := strconv.ParseInt(fields[i], 10, 64)
		if err != nil {
			return traffic{}, err
		}
		*to = n
	}
	t.read *= sector
	t.bytes *= sector
	return t, nil
}

// daemonMetrics are the daemon's, by name.
type daemonMetrics map[string]*dto.MetricFamily

// commits is the histogram of Commits.
func (m daemonMetrics) commits() (*Histogram, error) {
	const name = metrics.Prefix + "commit_duration_seconds"
	f := m[name]
	if f == nil || len(f.GetMetric()) != 1 {
		return nil, fmt.Errorf("metrics of the daemon: there is no %s", name)
	}
	h := f.GetMetric()[0].GetHistogram()
	out := &Histogram{Count: h.GetSampleCount(), Seconds: h.GetSampleSum()}
	for _, b := range h.GetBucket() {
		if !math.IsInf(b.GetUpperBound(), 1) { // that for everything is Count
			out.Buckets = append(out.Buckets, Bucket{b.GetUpperBound(), b.GetCumulativeCount()})
		}
	}
	return out, nil
}

// phases are the sums of the histograms of Apply and Commit, and of their phases.
func (m daemonMetrics) phases() map[string]float64 {
	sums := map[string]float64{}
	for _, call := range []string{"apply", "commit"} {
		for _, one := range m[metrics.Prefix+call+"_duration_seconds"].GetMetric() {
			sums[call] += one.GetHistogram().GetSampleSum()
		}
		for _, one := range m[metrics.Prefix+call+"_phase_duration_seconds"].GetMetric() {
			for _, l := range one.GetLabel() {
				sums[call+" "+l.GetValue()] += one.GetHistogram().GetSampleSum()
			}
		}
	}
	return sums
}

// reachesContainerd reports whether the daemon is connected to containerd.
func (m daemonMetrics) reachesContainerd() bool {
	all := m[metrics.Prefix+"containerd_reachable"].GetMetric()
	return len(all) == 1 && all[0].GetGauge().GetValue() == 1
}

// extracted is how many bytes the daemon has extracted, decompressed by itself.
func (m daemonMetrics) extracted() (bytes float64) {
	for _, one := range m[metrics.Prefix+"apply_bytes_total"].GetMetric() {
		for _, l := range one.GetLabel() {
			if l.GetValue() == "internal" {
				bytes += one.GetCounter().GetValue()
			}
		}
	}
	return bytes
}
