package pulls

import (
	"fmt"
	"math"
	"strings"

	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/published"
)

// Table is a report as Markdown: where it was measured, a table with a row for each variant of
// each setting, and, if there were any, tables of Commits and of what others noticed.
func (r *Report) Table() string {
	var b strings.Builder
	b.WriteString(r.origin())
	rows := r.Rows()
	table(&b, []string{"image", "unpacks", "igzip", "snapshotter", "seconds", "/ overlayfs", "CPU s", "/ overlayfs", "MiB written", "write requests", "flushes", "containerd MiB", "daemon MiB"}, rows, func(row Row) []string {
		return append(row.names(),
			row.Seconds.Text(2), row.Ratio.Text(2),
			row.Of(func(p Pull) float64 { return p.CPU }).Text(2), published.Number(row.CPURatio.Median, 2),
			row.middle(0, func(p Pull) float64 { return float64(p.Bytes) / mib }),
			row.middle(0, func(p Pull) float64 { return float64(p.Writes) }),
			row.middle(0, func(p Pull) float64 { return float64(p.Flushes) }),
			row.middle(0, func(p Pull) float64 { return float64(p.ContainerdMemory) / mib }),
			row.middle(0, func(p Pull) float64 { return float64(p.DaemonMemory) / mib }),
		)
	})
	table(&b, []string{"image", "unpacks", "igzip", "snapshotter", "seconds / overlayfs-sync", "MiB written / overlayfs-sync", "write requests / overlayfs-sync", "seconds / erofs"}, rows, func(row Row) []string {
		if v := place(row.Variant); v < 0 || !Variants[v].daemon {
			return nil
		}
		seconds := func(p Pull) float64 { return p.Seconds }
		cells := []published.Spread{
			against(rows, row, "overlayfs-sync", seconds),
			against(rows, row, "overlayfs-sync", func(p Pull) float64 { return float64(p.Bytes) }),
			against(rows, row, "overlayfs-sync", func(p Pull) float64 { return float64(p.Writes) }),
			against(rows, row, "erofs", seconds),
		}
		if math.IsNaN(cells[0].Median) && math.IsNaN(cells[3].Median) {
			return nil
		}
		texts := row.names()
		for _, c := range cells {
			texts = append(texts, c.Text(2))
		}
		return texts
	})
	table(&b, []string{"image", "unpacks", "igzip", "snapshotter", "Commits", "ms, mean", "at most 5 ms", "99 % at most", "all at most"}, rows, func(row Row) []string {
		h := row.commits()
		if h.Count == 0 {
			return nil
		}
		return append(row.names(), fmt.Sprint(h.Count), published.Number(h.Seconds/float64(h.Count)*1000, 2),
			fmt.Sprintf("%.1f %%", 100*float64(h.within(0.005))/float64(h.Count)), h.bound(0.99), h.bound(1))
	})
	table(&b, []string{"image", "unpacks", "igzip", "snapshotter", "s in Apply", "extract", "seal", "sync", "s in Commit", "walk", "sync", "transaction"}, rows, func(row Row) []string {
		if row.Pulls[0].Phases == nil {
			return nil
		}
		cells := row.names()
		for _, name := range []string{"apply", "apply extract", "apply seal", "apply sync", "commit", "commit walk", "commit sync", "commit transaction"} {
			cells = append(cells, row.middle(3, func(p Pull) float64 { return p.Phases[name] }))
		}
		return cells
	})
	table(&b, []string{"image", "unpacks", "igzip", "snapshotter", "neighbor MB/s", "fdatasync ms: p50", "p99", "max", "lease ms: p50", "p99", "max"}, rows, func(row Row) []string {
		if row.Pulls[0].Fdatasync == nil || row.Pulls[0].Lease == nil {
			return nil
		}
		cells := append(row.names(), row.middle(0, func(p Pull) float64 { return p.NeighborRate / 1e6 }))
		for _, of := range []func(Pull) *Latency{func(p Pull) *Latency { return p.Fdatasync }, func(p Pull) *Latency { return p.Lease }} {
			most := 0.0
			for _, p := range row.Pulls {
				if l := of(p); l != nil {
					most = max(most, l.Max)
				}
			}
			ms := func(part func(*Latency) float64) string {
				return row.middle(2, func(p Pull) float64 {
					if l := of(p); l != nil {
						return part(l) * 1000
					}
					return math.NaN()
				})
			}
			cells = append(cells, ms(func(l *Latency) float64 { return l.P50 }), ms(func(l *Latency) float64 { return l.P99 }), published.Number(most*1000, 2))
		}
		return cells
	})
	return b.String()
}

// origin is where a report comes from.
func (r *Report) origin() string {
	var b strings.Builder
	rounds := "rounds"
	if r.Rounds == 1 {
		rounds = "round"
	}
	fmt.Fprintf(&b, "%s on a disk of kind `%s`, %d %s; %s", r.FS, r.Disk, r.Rounds, rounds, r.Origin)
	if r.Fetched {
		b.WriteString("; every blob was fetched before")
	}
	if r.Neighbor > 0 {
		fmt.Fprintf(&b, "; a neighbor writes %d MB/s to its pages", r.Neighbor/1e6)
	}
	if r.Scale > 1 {
		fmt.Fprintf(&b, "; images have one part in %d of their size", r.Scale)
	}
	b.WriteString("\n")
	for _, line := range r.LeftOut {
		fmt.Fprintf(&b, "\nLeft out: %s\n", line)
	}
	return b.String()
}

// names are the first cells of a row.
func (r Row) names() []string {
	igzip := "no"
	if r.Igzip {
		igzip = "yes"
	}
	return []string{r.Image, fmt.Sprint(r.Unpacks), igzip, r.Variant}
}

// middle is the median of a figure; a dash when it is zero or not there.
func (r Row) middle(digits int, figure func(Pull) float64) string {
	m := r.Of(figure).Median
	if m == 0 {
		return "–"
	}
	return published.Number(m, digits)
}

// commits are the Commits of all pulls.
func (r Row) commits() Histogram {
	var sum Histogram
	for _, p := range r.Pulls {
		if p.Commits == nil {
			continue
		}
		sum.Count += p.Commits.Count
		sum.Seconds += p.Commits.Seconds
		if sum.Buckets == nil {
			sum.Buckets = make([]Bucket, len(p.Commits.Buckets))
		}
		for i, b := range p.Commits.Buckets {
			sum.Buckets[i] = Bucket{b.AtMost, sum.Buckets[i].Count + b.Count}
		}
	}
	return sum
}

// within is how many took at most so many seconds, for a boundary of the buckets.
func (h Histogram) within(seconds float64) uint64 {
	for _, b := range h.Buckets {
		if b.AtMost == seconds {
			return b.Count
		}
	}
	return 0
}

// bound is the least boundary below which a part of all is.
func (h Histogram) bound(part float64) string {
	for _, b := range h.Buckets {
		if float64(b.Count) >= part*float64(h.Count) {
			return fmt.Sprintf("%g ms", b.AtMost*1000)
		}
	}
	return "more"
}

// table writes a table with what cells returns for each row, if that is anything.
func table(b *strings.Builder, titles []string, rows []Row, cells func(Row) []string) {
	var lines [][]string
	for _, row := range rows {
		if c := cells(row); c != nil {
			lines = append(lines, c)
		}
	}
	published.Table(b, titles, lines)
}

// CompareTable is what Compare has found, as Markdown.
func (r *Report) CompareTable() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%sBase: revision %.12s\n\n| image | unpacks | igzip | snapshotter | base s | new s | new / base | change | test |\n|---|---|---|---|---|---|---|---|---|\n", r.origin(), r.Base)
	for _, c := range r.Compare() {
		row := Row{Setting: c.Setting, Variant: c.Variant}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s |\n", strings.Join(row.names(), " | "), c.Base.Text(2), c.New.Text(2), c.Ratio.Text(3), c.Delta, c.P)
	}
	return b.String()
}
