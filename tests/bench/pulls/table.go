package pulls

import (
	"bytes"
	"fmt"
	"math"
	"os"
	"strings"
)

// Table is a report as Markdown: where it was measured, a table with a row for each variant of
// each setting, and, if there were any, tables of Commits and of what others noticed.
func (r *Report) Table() string {
	var b strings.Builder
	b.WriteString(r.origin())
	rows := r.Rows()
	table(&b, []string{"image", "unpacks", "igzip", "snapshotter", "seconds", "/ overlayfs", "CPU s", "/ overlayfs", "MiB written", "write requests", "flushes", "containerd MiB", "daemon MiB"}, rows, func(row Row) []string {
		return append(row.names(),
			row.Seconds.text(2), row.Ratio.text(2),
			row.Of(func(p Pull) float64 { return p.CPU }).text(2), number(row.CPURatio.Median, 2),
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
		cells := []Spread{
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
			texts = append(texts, c.text(2))
		}
		return texts
	})
	table(&b, []string{"image", "unpacks", "igzip", "snapshotter", "Commits", "ms, mean", "at most 5 ms", "99 % at most", "all at most"}, rows, func(row Row) []string {
		h := row.commits()
		if h.Count == 0 {
			return nil
		}
		return append(row.names(), fmt.Sprint(h.Count), number(h.Seconds/float64(h.Count)*1000, 2),
			fmt.Sprintf("%.1f %%", 100*float64(h.within(0.005))/float64(h.Count)), h.bound(0.99), h.bound(1))
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
			cells = append(cells, ms(func(l *Latency) float64 { return l.P50 }), ms(func(l *Latency) float64 { return l.P99 }), number(most*1000, 2))
		}
		return cells
	})
	return b.String()
}

// origin is where a report comes from.
func (r *Report) origin() string {
	var b strings.Builder
	dirty := ""
	if r.Dirty {
		dirty = " with changes"
	}
	rounds := "rounds"
	if r.Rounds == 1 {
		rounds = "round"
	}
	fmt.Fprintf(&b, "%s on a disk of kind `%s`, %d %s; %s, %d cores, %d GiB, Linux %s; containerd %s; revision %.12s%s; %s: `%s`",
		r.FS, r.Disk, r.Rounds, rounds, r.Machine.CPU, r.Machine.Cores, r.Machine.Memory>>30, r.Machine.Kernel, r.Containerd, r.Revision, dirty, r.Time.Format("2006-01-02"), r.Command)
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
	return number(m, digits)
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

func number(v float64, digits int) string {
	if math.IsNaN(v) {
		return "–"
	}
	return fmt.Sprintf("%.*f", digits, v)
}

func (s Spread) text(digits int) string {
	if math.IsNaN(s.Median) {
		return "–"
	}
	return fmt.Sprintf("%.*f (%.*f–%.*f)", digits, s.Median, digits, s.Q1, digits, s.Q3)
}

// table writes a table with what cells returns for each row, if that is anything.
func table(b *strings.Builder, titles []string, rows []Row, cells func(Row) []string) {
	var lines [][]string
	for _, row := range rows {
		if c := cells(row); c != nil {
			lines = append(lines, c)
		}
	}
	if len(lines) == 0 {
		return
	}
	fmt.Fprintf(b, "\n| %s |\n|%s\n", strings.Join(titles, " | "), strings.Repeat("---|", len(titles)))
	for _, c := range lines {
		fmt.Fprintf(b, "| %s |\n", strings.Join(c, " | "))
	}
}

// markers enclose the table of a report in a document.
func markers(name string) (begin, end string) {
	return "<!-- bench table " + name + " -->\n", "<!-- bench table end -->\n"
}

// TableIn returns what stands in a document as the table of the report of a name; ok is false
// when it has none.
func TableIn(document []byte, name string) (table []byte, ok bool) {
	begin, end := markers(name)
	_, rest, ok := bytes.Cut(document, []byte(begin))
	if !ok {
		return nil, false
	}
	table, _, ok = bytes.Cut(rest, []byte(end))
	return table, ok
}

// Insert replaces the table of the report of a name in a document, or adds it at the end.
func (r *Report) Insert(file, name string) error {
	document, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	begin, end := markers(name)
	whole := begin + r.Table() + end
	if old, ok := TableIn(document, name); ok {
		document = bytes.Replace(document, []byte(begin+string(old)+end), []byte(whole), 1)
	} else {
		document = append(document, "\n"+whole...)
	}
	return os.WriteFile(file, document, 0o644)
}

// CompareTable is what Compare has found, as Markdown.
func (r *Report) CompareTable() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%sBase: revision %.12s\n\n| image | unpacks | igzip | snapshotter | base s | new s | new / base | change | test |\n|---|---|---|---|---|---|---|---|---|\n", r.origin(), r.Base)
	for _, c := range r.Compare() {
		row := Row{Setting: c.Setting, Variant: c.Variant}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s |\n", strings.Join(row.names(), " | "), c.Base.text(2), c.New.text(2), c.Ratio.text(3), c.Delta, c.P)
	}
	return b.String()
}
