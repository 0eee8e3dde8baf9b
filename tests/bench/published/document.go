package published

import (
	"bytes"
	"fmt"
	"os"
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
