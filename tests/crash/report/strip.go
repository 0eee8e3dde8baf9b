package report

import (
	"fmt"
	"html"
	"html/template"
	"math"
	"strings"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/campaign"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
)

// strip is the drawing of one recording.
type strip struct {
	ID      string
	Caption string
	SVG     template.HTML
}

// The drawing, in its own units. From top to bottom: the writes of the log, the
// promised layers, the states.
const (
	width = 1120
	left  = 92 // room for the names of the rows
	right = 12

	logTop, logHeight       = 14, 70
	layersTop, layersHeight = 100, 56
	statesTop, statesHeight = 172, 84
	secondTop, secondHeight = 262, 14
	axisTop                 = 284
	height                  = 312

	bins = 254
)

// canvas turns points of the log into places on the drawing.
type canvas struct {
	strings.Builder
	points int
}

func (c *canvas) x(point float64) float64 {
	return left + point/float64(max(c.points, 1))*(width-left-right)
}

func (c *canvas) printf(format string, args ...any) { fmt.Fprintf(c, format+"\n", args...) }

func (c *canvas) name(y float64, text string) {
	c.printf(`<text class="name" x="%d" y="%.1f">%s</text>`, left-10, y, html.EscapeString(text))
}

func draw(r *lab.Recording, lines []campaign.Line) strip {
	c := &canvas{points: len(r.Log.Entries)}
	c.printf(`<svg viewBox="0 0 %d %d" role="img" aria-label="%s">`, width, height, html.EscapeString(r.ID()))
	c.log(r.Log.Entries)
	c.layers(r)
	n := c.states(r.ID(), lines)
	c.axis(r)
	c.printf(`</svg>`)
	caption := fmt.Sprintf("%d writes, %d flushes, %.1f MiB; %d states examined", r.Stats.Writes, r.Stats.Flushes, float64(r.Stats.Bytes)/(1<<20), n)
	if len(r.Options) > 0 {
		caption += "; mounted with " + strings.Join(r.Options, ",")
	}
	return strip{ID: r.ID(), Caption: caption, SVG: template.HTML(c.String())}
}

// log draws a line for each write, as long as its size in powers of two, and one
// across for each flush.
func (c *canvas) log(entries []disk.Entry) {
	const bottom = logTop + logHeight
	c.name(logTop+logHeight/2-2, "log")
	c.name(logTop+logHeight/2+12, "of the disk")
	c.printf(`<rect class="row" x="%d" y="%d" width="%d" height="%d"/>`, left, logTop, width-left-right, logHeight)
	var writes, flushes, discards strings.Builder
	for i, e := range entries {
		x := c.x(float64(i) + .5)
		switch e.Kind {
		case disk.Flush:
			fmt.Fprintf(&flushes, "M%.1f %dV%d", x, logTop, bottom)
		case disk.Discard:
			fmt.Fprintf(&discards, "M%.1f %dv-6", x, bottom)
		case disk.Write:
			// 4 KiB is short, 1 MiB is the whole height.
			share := min(1, .2+.8*math.Log2(max(1, float64(e.Length)/4096))/8)
			fmt.Fprintf(&writes, "M%.1f %dv-%.1f", x, bottom, share*(logHeight-8))
		}
	}
	c.printf(`<path class="flush" d="%s"/>`, flushes.String())
	c.printf(`<path class="write" d="%s"/>`, writes.String())
	if discards.Len() > 0 {
		c.printf(`<path class="discard" d="%s"/>`, discards.String())
	}
}

// layers draws how many layers are promised at each point.
func (c *canvas) layers(r *lab.Recording) {
	const bottom = layersTop + layersHeight
	c.name(layersTop+layersHeight/2-2, "layers")
	c.name(layersTop+layersHeight/2+12, "promised")
	c.printf(`<rect class="row" x="%d" y="%d" width="%d" height="%d"/>`, left, layersTop, width-left-right, layersHeight)
	most := 1
	for _, m := range r.Marks {
		most = max(most, oracle.At(r.Marks, m.Index+1).Promised())
	}
	var area, ticks strings.Builder
	y := func(n int) float64 { return bottom - float64(n)/float64(most)*(layersHeight-8) }
	fmt.Fprintf(&area, "M%d %d", left, bottom)
	for _, m := range r.Marks {
		if m.Phase != workload.Ack || m.Op != workload.Commit && m.Op != workload.Remove {
			continue
		}
		x, n := c.x(float64(m.Index)+.5), oracle.At(r.Marks, m.Index+1).Promised()
		fmt.Fprintf(&area, "H%.1fV%.1f", x, y(n))
		if m.Op == workload.Commit {
			fmt.Fprintf(&ticks, `<circle class="ack" cx="%.1f" cy="%.1f" r="2.6"><title>entry %d: commit of %s acknowledged</title></circle>`,
				x, y(n), m.Index, html.EscapeString(m.Name))
		}
	}
	fmt.Fprintf(&area, "H%dV%dZ", width-right, bottom)
	c.printf(`<path class="promised" d="%s"/>%s`, area.String(), ticks.String())
	c.printf(`<text class="most" x="%d" y="%d">%d</text>`, width-right, layersTop-4, most)
}

// bin counts the states of a few neighbouring points, by verdict.
type bin map[string]int

// worst first, at the bottom of each bar: a single one must be seen.
var verdicts = []lab.Verdict{lab.Lied, lab.Lost, lab.Flawed, lab.NotMeasured, lab.Survived}

func (c *canvas) states(id string, lines []campaign.Line) int {
	first, second := make([]bin, bins), make([]bin, bins)
	total, most := 0, 1
	for _, l := range lines {
		if l.Recording() != id {
			continue
		}
		path, err := l.Path()
		if err != nil {
			continue
		}
		total++
		row := first
		if len(path) > 1 {
			row = second
		}
		at := min(path[0].Point*bins/max(c.points, 1), bins-1)
		if row[at] == nil {
			row[at] = bin{}
		}
		row[at][l.Verdict]++
		n := 0
		for _, k := range first[at] {
			n += k
		}
		most = max(most, n)
	}
	c.name(statesTop+statesHeight/2-2, "states")
	c.name(statesTop+statesHeight/2+12, "by verdict")
	c.printf(`<rect class="row" x="%d" y="%d" width="%d" height="%d"/>`, left, statesTop, width-left-right, statesHeight)
	c.bars(first, statesTop+statesHeight, statesHeight-6, most)
	c.printf(`<text class="most" x="%d" y="%d">%d</text>`, width-right, statesTop-4, most)
	c.name(secondTop+11, "second cut")
	c.printf(`<rect class="row" x="%d" y="%d" width="%d" height="%d"/>`, left, secondTop, width-left-right, secondHeight)
	c.bars(second, secondTop+secondHeight, secondHeight, 1)
	return total
}

// bars draws a row of bins. With most at 1, every bar has the whole height: then
// the row only shows whether something was examined, and the worst of it.
func (c *canvas) bars(row []bin, bottom, full float64, most int) {
	wide := float64(width-left-right) / bins
	for i, b := range row {
		y := bottom
		for _, v := range verdicts {
			n := b[v.String()]
			if n == 0 {
				continue
			}
			h := float64(n) / float64(most) * full
			if v != lab.Survived {
				h = max(h, 5)
			}
			h = min(h, y-(bottom-full))
			if h <= 0 {
				break
			}
			y -= h
			c.printf(`<rect class="%s" x="%.2f" y="%.1f" width="%.2f" height="%.1f"><title>entries %d to %d: %d %s</title></rect>`,
				strings.ReplaceAll(v.String(), " ", "-"), left+float64(i)*wide+.3, y, wide-.6, h,
				i*c.points/bins, (i+1)*c.points/bins, n, v)
			if most == 1 {
				break
			}
		}
	}
}

// axis names the entries of the log.
func (c *canvas) axis(r *lab.Recording) {
	step := 50
	for c.points/step > 12 {
		step *= 2
	}
	for p := 0; p <= c.points; p += step {
		x := c.x(float64(p))
		c.printf(`<path class="tick" d="M%.1f %dv5"/><text class="at" x="%.1f" y="%d">%d</text>`, x, axisTop, x, axisTop+18, p)
	}
	c.printf(`<path class="tick" d="M%d %dH%d"/>`, left, axisTop, width-right)
	c.name(axisTop+18, "entry")
	if r.Start > 0 {
		c.printf(`<path class="tick" d="M%.1f %dV%d"/>`, c.x(float64(r.Start)), logTop, axisTop)
	}
}
