// Package report draws a campaign: one HTML file with nothing outside of it, to
// be opened in a browser, dark or light.
//
//	counts      those of the summary
//	strips      for some recordings the log of the disk, the layers that were
//	            promised along it, and the states that were examined
//	gates       what the harness has found where it had to
//	states      those that did not survive, each with the command that shows it
package report

import (
	"bytes"
	"cmp"
	_ "embed"
	"fmt"
	"html/template"
	"regexp"
	"slices"
	"strings"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/campaign"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
)

//go:embed report.html
var page string

var layout = template.Must(template.New("report").Funcs(template.FuncMap{
	"kind":  func(verdict string) string { return strings.ReplaceAll(verdict, " ", "-") },
	"short": func(text string) string { return digest.ReplaceAllString(text, "$1…") },
}).Parse(page))

// digest is what names of layers are too long by.
var digest = regexp.MustCompile(`(sha256:[0-9a-f]{12})[0-9a-f]{52}`)

// figures bounds how many recordings are drawn: those with bad states first,
// then the first ones of each file system.
const figures = 9

type view struct {
	*campaign.Summary
	Line    string
	Dir     string
	Good    bool
	Counts  []count
	Strips  []strip
	Classes []class
	Bad     []campaign.Line
	More    int
}

type count struct {
	Name, Kind string
	Number     string
}

// class is a row of the table of state classes.
type class struct {
	Name                                     string
	Survived, Lost, Lies, Flawed, Unmeasured int
}

// HTML draws the campaign.
func HTML(s *campaign.Store) ([]byte, error) {
	sum := s.Summary()
	v := view{Summary: sum, Line: sum.Line(), Dir: s.Dir, Good: sum.Good()}
	for _, c := range []struct {
		name, kind string
		n          int
	}{
		{"survived", "survived", sum.Survived}, {"lost", "lost", sum.Lost}, {"lies", "lie", sum.Lies},
		{"flawed", "flawed", sum.Flawed}, {"not measured", "not-measured", sum.Unmeasured},
	} {
		v.Counts = append(v.Counts, count{c.name, c.kind, thousands(c.n)})
	}
	v.Classes = classes(s.Lines)
	v.Bad = append(slices.Clone(sum.Bad), sum.Unlooked...)
	if n := len(v.Bad); n > 100 {
		v.Bad, v.More = v.Bad[:100], n-100
	}
	for _, name := range choose(sum) {
		r, err := lab.Load(s.RecordingDir(name))
		if err != nil {
			return nil, fmt.Errorf("report: %w", err)
		}
		v.Strips = append(v.Strips, draw(r, s.Lines))
	}
	var out bytes.Buffer
	if err := layout.Execute(&out, v); err != nil {
		return nil, fmt.Errorf("report: %w", err)
	}
	return out.Bytes(), nil
}

// choose names the recordings to draw.
func choose(s *campaign.Summary) []string {
	bad := map[string]bool{}
	for _, l := range s.Bad {
		bad[l.Recording()] = true
	}
	names := slices.Clone(s.Recordings)
	slices.SortStableFunc(names, func(a, b string) int {
		return cmp.Compare(boolInt(bad[b]), boolInt(bad[a]))
	})
	return names[:min(len(names), figures)]
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

func classes(lines []campaign.Line) []class {
	by := map[string]*class{}
	for _, l := range lines {
		path, err := l.Path()
		if err != nil || len(path) == 0 {
			continue // of a cut that has no state
		}
		name := path[len(path)-1].Class.String()
		if len(path) > 1 {
			name = "second cut"
		}
		c := by[name]
		if c == nil {
			c = &class{Name: name}
			by[name] = c
		}
		switch l.Verdict {
		case lab.Survived.String():
			c.Survived++
		case lab.NotMeasured.String():
			c.Unmeasured++
		case lab.Flawed.String():
			c.Flawed++
		}
		if l.Lost {
			c.Lost++
		}
		if l.Lie {
			c.Lies++
		}
	}
	order := []string{"prefix", "flushed", "drop", "keep", "subset", "torn", "mix", "second cut"}
	var out []class
	for _, name := range order {
		if c := by[name]; c != nil {
			out = append(out, *c)
		}
	}
	return out
}

// thousands writes 1234567 as 1 234 567, with thin spaces.
func thousands(n int) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "\u2009" + s[i:]
	}
	return s
}
