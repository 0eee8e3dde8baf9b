package published

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// Table writes a table as Markdown, unless it has no lines.
func Table(b *strings.Builder, titles []string, lines [][]string) {
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
func Insert(file, name, table string) error {
	document, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	begin, end := markers(name)
	whole := begin + table + end
	if old, ok := TableIn(document, name); ok {
		document = bytes.Replace(document, []byte(begin+string(old)+end), []byte(whole), 1)
	} else {
		document = append(document, "\n"+whole...)
	}
	return os.WriteFile(file, document, 0o644)
}

// Report is one that a document has the table of.
type Report interface {
	Table() string
	Source() Origin
}

// Source is where a report comes from.
func (o Origin) Source() Origin { return o }

// Unlike compares docs/performance.md with the reports in docs/bench whose names have a prefix: each
// has its table there, and nothing else has one under such a name. It is called in the directory
// of a package below tests/bench.
func Unlike(prefix string, load func(file string) (Report, error)) (all []error) {
	const docs = "../../../docs"
	document, err := os.ReadFile(filepath.Join(docs, "performance.md"))
	if err != nil {
		return []error{err}
	}
	for _, m := range regexp.MustCompile(`<!-- bench table (`+regexp.QuoteMeta(prefix)+`\S+\.json) -->`).FindAllSubmatch(document, -1) {
		if _, err := os.Stat(filepath.Join(docs, "bench", string(m[1]))); err != nil {
			all = append(all, fmt.Errorf("docs/performance.md has the table of %s, which is not in docs/bench: %w", m[1], err))
		}
	}
	files, err := filepath.Glob(filepath.Join(docs, "bench", prefix+"*.json"))
	if err != nil || len(files) == 0 {
		return append(all, fmt.Errorf("docs/bench has no report %s*.json: %v", prefix, err))
	}
	for _, file := range files {
		r, err := load(file)
		if err != nil {
			all = append(all, err)
			continue
		}
		if table, ok := TableIn(document, filepath.Base(file)); !ok || string(table) != r.Table() {
			all = append(all, fmt.Errorf("docs/performance.md lacks the table of %s, or has another one: in tests/, go run ./cmd/bench table --into ../docs/performance.md %s", file, strings.TrimPrefix(file, "../../")))
		}
		if r.Source().Dirty {
			all = append(all, fmt.Errorf("%s was measured with a product that no revision has", file))
		}
	}
	return all
}
