package pulls

import (
	"cmp"
	"slices"

	"golang.org/x/perf/benchmath"

	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/published"
)

// baseline is the variant to which ratios are.
const baseline = "overlayfs"

// Row is what all pulls of one variant with one setting came to.
type Row struct {
	Setting
	Variant string
	Pulls   []Pull // in the order of rounds
	Seconds published.Spread
	// Ratio and CPURatio are the quotients of the seconds, and of the processor time, to those of
	// overlayfs with the same setting in the same round; not a number without overlayfs.
	Ratio, CPURatio published.Spread
}

// Of is the spread of a figure of the pulls.
func (r Row) Of(figure func(Pull) float64) published.Spread {
	values := make([]float64, len(r.Pulls))
	for i, p := range r.Pulls {
		values[i] = figure(p)
	}
	return published.SpreadOf(values)
}

// Rows summarizes the pulls, in the order of images, settings and variants.
func (r *Report) Rows() []Row {
	type key struct {
		Setting
		variant string
	}
	byKey := map[key][]Pull{}
	for _, p := range r.Pulls {
		k := key{p.Setting, p.Variant}
		byKey[k] = append(byKey[k], p)
	}
	var rows []Row
	for k, all := range byKey {
		slices.SortFunc(all, func(a, b Pull) int { return cmp.Compare(a.Round, b.Round) })
		row := Row{Setting: k.Setting, Variant: k.variant, Pulls: all}
		row.Seconds = row.Of(func(p Pull) float64 { return p.Seconds })
		base := byKey[key{k.Setting, baseline}]
		row.Ratio = ratios(all, base, func(p Pull) float64 { return p.Seconds })
		row.CPURatio = ratios(all, base, func(p Pull) float64 { return p.CPU })
		rows = append(rows, row)
	}
	slices.SortFunc(rows, func(a, b Row) int {
		return cmp.Or(
			cmp.Compare(slices.Index(ImageNames, a.Image), slices.Index(ImageNames, b.Image)),
			cmp.Compare(a.Unpacks, b.Unpacks),
			cmp.Compare(bit(a.Igzip), bit(b.Igzip)),
			cmp.Compare(place(a.Variant), place(b.Variant)),
			cmp.Compare(a.Variant, b.Variant),
		)
	})
	return rows
}

func bit(b bool) int {
	if b {
		return 1
	}
	return 0
}

// ratios is the spread of the quotients of a figure of two variants in the same rounds.
func ratios(pulls, base []Pull, figure func(Pull) float64) published.Spread {
	inRound := map[int]Pull{}
	for _, p := range base {
		inRound[p.Round] = p
	}
	var all []float64
	for _, p := range pulls {
		if b, ok := inRound[p.Round]; ok && figure(b) > 0 {
			all = append(all, figure(p)/figure(b))
		}
	}
	return published.SpreadOf(all)
}

// against is the spread of the quotients of a figure of a row to that of another variant with the
// same setting, in the same rounds.
func against(rows []Row, row Row, variant string, figure func(Pull) float64) published.Spread {
	i := slices.IndexFunc(rows, func(r Row) bool { return r.Setting == row.Setting && r.Variant == variant })
	if i < 0 {
		return published.SpreadOf(nil)
	}
	return ratios(row.Pulls, rows[i].Pulls, figure)
}

// Comparison is a variant of this revision beside the same of another one.
type Comparison struct {
	Setting
	Variant   string
	Base, New published.Spread // seconds
	Ratio     published.Spread // of the same rounds
	// Delta is the change of the median as benchstat prints it: "~" when a Mann-Whitney U-test
	// does not reject, at 0.05, that both revisions take the same time; and the test's p.
	Delta, P string
}

// Compare compares each variant with its counterpart of the base revision.
func (r *Report) Compare() []Comparison {
	rows := r.Rows()
	var all []Comparison
	for _, row := range rows {
		i := slices.IndexFunc(rows, func(b Row) bool { return b.Setting == row.Setting && b.Variant == row.Variant+baseSuffix })
		if i < 0 {
			continue
		}
		seconds := func(p Pull) float64 { return p.Seconds }
		sample := func(r Row) *benchmath.Sample {
			var values []float64
			for _, p := range r.Pulls {
				values = append(values, p.Seconds)
			}
			return benchmath.NewSample(values, &benchmath.DefaultThresholds)
		}
		test := benchmath.AssumeNothing.Compare(sample(rows[i]), sample(row))
		all = append(all, Comparison{
			Setting: row.Setting, Variant: row.Variant, Base: rows[i].Seconds, New: row.Seconds,
			Ratio: ratios(row.Pulls, rows[i].Pulls, seconds),
			Delta: test.FormatDelta(rows[i].Seconds.Median, row.Seconds.Median), P: test.String(),
		})
	}
	return all
}

// LatencyOf summarizes durations in seconds; nil for none.
func LatencyOf(seconds []float64) *Latency {
	if len(seconds) == 0 {
		return nil
	}
	sorted := slices.Sorted(slices.Values(seconds))
	at := func(q float64) float64 { return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)] }
	return &Latency{Count: len(sorted), P50: at(0.5), P99: at(0.99), Max: sorted[len(sorted)-1]}
}
