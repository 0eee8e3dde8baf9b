package pulls

import (
	"encoding/xml"
	"fmt"
	"math"
	"strings"

	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/published"
)

// The chart's measures, in pixels.
const (
	chartWidth  = 860
	chartLeft   = 150 // of the bars
	chartRight  = 110 // of the room for their figures
	chartLine   = 20  // height of a bar with its distance
	chartHead   = 64
	chartTitle  = 30 // of a group
	chartBottom = 40
)

var colors = map[string]string{
	"overlayfs": "#8a8f98", "overlayfs-sync": "#5b6b8c", "erofs": "#b08a3e", "durable": "#3f8f6b", "durable-differ": "#1f6f4f", "fetch": "#c9c9c9",
}

// Chart is a report as an SVG: for each setting a bar for each variant, as long as the median of
// the ratios to overlayfs, with a line from quartile to quartile, and the median of the seconds.
// Without overlayfs, bars are seconds.
func (r *Report) Chart() string {
	var b strings.Builder
	rows := r.Rows()
	value := func(row Row) published.Spread { return row.Ratio }
	unit := "time of a pull, as a part of that with overlayfs, which syncs nothing"
	for _, row := range rows {
		if math.IsNaN(row.Ratio.Median) {
			value, unit = func(row Row) published.Spread { return row.Seconds }, "seconds of a pull"
		}
	}
	most, groups := 1.0, map[Setting]bool{}
	for _, row := range rows {
		most = max(most, value(row).Q3)
		groups[row.Setting] = true
	}
	height := chartHead + len(rows)*chartLine + len(groups)*chartTitle + chartBottom
	scale := float64(chartWidth-chartLeft-chartRight) / most
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n", chartWidth, height, chartWidth, height)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="#ffffff"/>`+"\n", chartWidth, height)
	svgText(&b, 16, 26, `font-size="15" font-weight="bold"`, fmt.Sprintf("%s, disk %s: %s", r.FS, r.Disk, unit))
	svgText(&b, 16, 46, `fill="#555555"`, fmt.Sprintf("median of %d rounds, line from quartile to quartile; %s, %d cores, Linux %s; revision %.12s", r.Rounds, r.Machine.CPU, r.Machine.Cores, r.Machine.Kernel, r.Revision))
	one := chartLeft + scale
	fmt.Fprintf(&b, `<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="#999999" stroke-dasharray="3 3"/>`+"\n", one, chartHead, one, height-chartBottom)
	svgText(&b, one, float64(height-chartBottom+16), `text-anchor="middle" fill="#555555"`, "1")
	y := float64(chartHead)
	last := Setting{}
	for _, row := range rows {
		if row.Setting != last {
			last = row.Setting
			y += chartTitle
			svgText(&b, 16, y-8, `font-weight="bold"`, title(row.Setting))
		}
		v := value(row)
		color := colors[strings.TrimSuffix(row.Variant, baseSuffix)]
		middle := y + chartLine/2 - 2
		svgText(&b, chartLeft-8, middle+4, `text-anchor="end"`, row.Variant)
		fmt.Fprintf(&b, `<rect x="%d" y="%.1f" width="%.1f" height="%d" fill="%s"/>`+"\n", chartLeft, y, v.Median*scale, chartLine-5, color)
		fmt.Fprintf(&b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="#222222"/>`+"\n", chartLeft+v.Q1*scale, middle, chartLeft+v.Q3*scale, middle)
		svgText(&b, chartLeft+max(v.Median, v.Q3)*scale+6, middle+4, `fill="#222222"`, fmt.Sprintf("%.2f (%.2f s)", v.Median, row.Seconds.Median))
		y += chartLine
	}
	b.WriteString("</svg>\n")
	return b.String()
}

func title(s Setting) string {
	igzip := ""
	if s.Igzip {
		igzip = ", igzip"
	}
	at := "one layer at a time"
	if s.Unpacks > 1 {
		at = fmt.Sprintf("%d layers at a time", s.Unpacks)
	}
	return s.Image + ", " + at + igzip
}

func svgText(b *strings.Builder, x, y float64, attrs, text string) {
	fmt.Fprintf(b, `<text x="%.1f" y="%.1f" %s>`, x, y, attrs)
	_ = xml.EscapeText(b, []byte(text)) // a Builder does not fail
	b.WriteString("</text>\n")
}
