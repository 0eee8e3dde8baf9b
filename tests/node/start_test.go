package node

import (
	"slices"
	"testing"
	"time"
)

// startRounds is how many starts of each snapshotter are measured.
const startRounds = 4

// TestStartTime measures from the start of everything, after a clean stop, to the
// instant at which all pods run, by turns. It prints the ratio.
func TestStartTime(t *testing.T) {
	seconds := map[string][]float64{}
	nodes := map[string]*node{}
	order := []string{overlayfs, durable}
	for _, s := range order {
		n := newNode(t, options{snapshotter: s, policy: never})
		check(t, n.kubelet.Start(t.Context()))
		n.run(t)
		n.stop(t)
		check(t, n.Reboot()) // kills what runs: the nodes take turns
		nodes[s] = n
	}
	for range startRounds {
		for _, s := range order {
			n := nodes[s]
			begin := time.Now()
			n.start(t)
			n.run(t)
			seconds[s] = append(seconds[s], time.Since(begin).Seconds())
			n.stop(t)
			check(t, n.Reboot())
		}
		slices.Reverse(order)
	}
	median := func(s string) float64 {
		sorted := slices.Sorted(slices.Values(seconds[s]))
		return (sorted[(len(sorted)-1)/2] + sorted[len(sorted)/2]) / 2
	}
	ratio := median(durable) / median(overlayfs)
	for s, all := range seconds {
		t.Logf("%-9s from start to all pods running: %.1f s, median %.2f s", s, all, median(s))
	}
	t.Logf("ratio durable to overlayfs: %.2f", ratio)
	if ratio > 5 {
		t.Errorf("a start with durable takes %.1f times as long as one with overlayfs", ratio)
	}
}
