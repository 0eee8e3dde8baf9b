package pulls

import (
	"encoding/xml"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
)

func TestTable(t *testing.T) {
	r := sample()
	text := r.Table()
	for _, line := range []string{
		"| golang | 1 | no | overlayfs | 2.00 (2.00–3.00) | 1.00 (1.00–1.00) | 1.00 (1.00–1.50) | 1.00 | 20 | 10 | 3 | 50 | – |",
		"| golang | 1 | no | durable | 1.40 (1.20–1.90) | 0.60 (0.55–0.65) | 0.70 (0.60–0.95) | 0.60 | 20 | 10 | 3 | 50 | 30 |",
		"| golang | 1 | no | durable | 12 | 10.00 | 25.0 % | 25 ms | 25 ms |",
	} {
		if !strings.Contains(text, "\n"+line+"\n") {
			t.Errorf("the table lacks\n%s\nin\n%s", line, text)
		}
	}
	if strings.Contains(text, "s in Apply") {
		t.Error("there is a table of phases, and the report has none")
	}
	for i, p := range r.Pulls {
		if p.Variant == "durable" {
			r.Pulls[i].Phases = map[string]float64{"apply": 1.5, "apply extract": 1, "commit": 0.25}
		}
	}
	if text := r.Table(); !strings.Contains(text, "| golang | 1 | no | durable | 1.500 | 1.000 | – | – | 0.250 | – | – | – |") {
		t.Errorf("the table lacks the phases:\n%s", text)
	}
	if strings.Contains(text, "fdatasync") {
		t.Error("there is a table of a neighbor, and there was none")
	}
	r.Neighbor = 400e6
	for i := range r.Pulls {
		r.Pulls[i].NeighborRate = 390e6
		r.Pulls[i].Fdatasync, r.Pulls[i].Lease = &Latency{100, 0.001, 0.002, float64(i)}, &Latency{9, 0.003, 0.004, 0.005}
	}
	const line = "| golang | 1 | no | durable | 390 | 1.00 | 2.00 | 5000.00 | 3.00 | 4.00 | 5.00 |"
	if text := r.Table(); !strings.Contains(text, "\n"+line+"\n") {
		t.Errorf("the table lacks\n%s\nin\n%s", line, text)
	}
}

// TestRivals: beside overlayfs that syncs, and erofs.
func TestRivals(t *testing.T) {
	r := sample()
	if text := r.Table(); strings.Contains(text, "overlayfs-sync") {
		t.Errorf("there is a table of what was not measured:\n%s", text)
	}
	for _, p := range slices.Clone(r.Pulls) {
		if p.Variant == "durable" {
			p.Variant, p.Seconds, p.Bytes, p.Writes, p.Commits = "overlayfs-sync", 2*p.Seconds, p.Bytes/2, p.Writes*2, nil
			r.Pulls = append(r.Pulls, p)
		}
	}
	const line = "| golang | 1 | no | durable | 0.50 (0.50–0.50) | 2.00 (2.00–2.00) | 0.50 (0.50–0.50) | – |"
	if text := r.Table(); !strings.Contains(text, "\n"+line+"\n") {
		t.Errorf("the table lacks\n%s\nin\n%s", line, text)
	}
}

// TestChart: the chart is XML, with a bar for each row, whatever the machine calls itself.
func TestChart(t *testing.T) {
	r := sample()
	for _, change := range []func(){func() {}, func() { r.Pulls = r.Pulls[1:2] }} { // then without overlayfs
		change()
		bars, text := 0, ""
		for d := xml.NewDecoder(strings.NewReader(r.Chart())); ; {
			token, err := d.Token()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			switch x := token.(type) {
			case xml.StartElement:
				if x.Name.Local == "rect" {
					bars++
				}
			case xml.CharData:
				text += string(x)
			}
		}
		if rows := len(r.Rows()); bars != rows+1 { // one is the background
			t.Errorf("%d rectangles for %d rows", bars, rows)
		}
		if !strings.Contains(text, "a <processor> & more") {
			t.Errorf("the chart lacks the machine: %s", text)
		}
	}
}
