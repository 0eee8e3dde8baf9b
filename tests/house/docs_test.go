package house

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// document reads a file of the product's module.
func document(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(product, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// packagesOf lists the packages of the product, sorted.
func packagesOf() []string { return slices.Sorted(maps.Keys(ours)) }

// byLastElement finds the package of the product that a document calls by the last
// element of its path; cmd is the command.
func byLastElement(name string) (path string, ok bool) {
	for _, p := range packagesOf() {
		if filepath.Base(p) == name || name == "cmd" && filepath.Dir(p) == "cmd" {
			return p, true
		}
	}
	return "", false
}

// reachable lists what each package of the product imports, directly or not.
func reachable() map[string]map[string]bool {
	all := map[string]map[string]bool{}
	var visit func(from, at string)
	visit = func(from, at string) {
		for _, to := range ours[at] {
			if !all[from][to] {
				all[from][to] = true
				visit(from, to)
			}
		}
	}
	for p := range ours {
		all[p] = map[string]bool{}
		visit(p, p)
	}
	return all
}

// TestImportLine: design.md's line on imports has each package once, in a group
// that stands before the groups of all that it may import.
func TestImportLine(t *testing.T) {
	line := regexp.MustCompile("(?s)Imports point one way: `([^`]*)`").FindStringSubmatch(document(t, "docs/design.md"))
	if line == nil {
		t.Fatal("docs/design.md has no line on imports")
	}
	place := map[string]int{}
	for i, group := range strings.Split(line[1], "→") {
		for name := range strings.FieldsFuncSeq(group, func(r rune) bool { return strings.ContainsRune("{}, \n", r) }) {
			p, ok := byLastElement(name)
			if _, twice := place[p]; !ok || twice {
				t.Errorf("the line has %s, which is no package of the product, or has it twice", name)
			}
			place[p] = i
		}
	}
	for _, p := range packagesOf() {
		if _, ok := place[p]; !ok {
			t.Errorf("the line lacks %s", p)
		}
		for _, i := range ours[p] {
			if place[i] <= place[p] {
				t.Errorf("%s may import %s, which does not stand behind it", p, i)
			}
		}
	}
}

// TestDrawing: in design.md's drawing, arrows lead from each package to all that it
// may import, directly or over other packages, and to nothing else. What is not a
// package of the product may stand in it, too.
func TestDrawing(t *testing.T) {
	drawing := regexp.MustCompile("(?s)```mermaid\nflowchart.*?```").FindString(document(t, "docs/design.md"))
	if drawing == "" {
		t.Fatal("docs/design.md has no drawing")
	}
	packages := map[string]string{} // by name in the drawing
	for _, node := range regexp.MustCompile(`(\w+)\[([^\]<]*)`).FindAllStringSubmatch(drawing, -1) {
		if _, ok := ours[node[2]]; ok {
			packages[node[1]] = node[2]
		}
	}
	drawn := map[string][]string{}
	for _, arrow := range regexp.MustCompile(`(?m)^\s*(\w+)(?:\[.*?\])? --(?: [^>]* --)?> (\w+)`).FindAllStringSubmatch(drawing, -1) {
		from, to := packages[arrow[1]], packages[arrow[2]]
		if from != "" && to != "" {
			drawn[from] = append(drawn[from], to)
		}
	}
	allowed := reachable()
	for _, p := range packagesOf() {
		if !slices.Contains(slices.Collect(maps.Values(packages)), p) {
			t.Errorf("the drawing lacks %s", p)
			continue
		}
		led := map[string]bool{}
		var follow func(string)
		follow = func(at string) {
			for _, to := range drawn[at] {
				if !led[to] {
					led[to] = true
					follow(to)
				}
			}
		}
		follow(p)
		for _, q := range packagesOf() {
			if led[q] != allowed[p][q] {
				t.Errorf("arrows lead from %s to %s: %v; the table of imports: %v", p, q, led[q], allowed[p][q])
			}
		}
	}
}

// TestReadingOrder: README's reading order has each package of the product once,
// before all that it may import, and the files that it names are in that package.
func TestReadingOrder(t *testing.T) {
	_, section, ok := strings.Cut(document(t, "README.md"), "\n## Reading the source\n")
	if !ok {
		t.Fatal("README.md has no section on reading the source")
	}
	section, _, _ = strings.Cut(section, "\n## ")
	var order []string
	for _, name := range regexp.MustCompile("`([a-z/_-]+(\\.go)?)`").FindAllStringSubmatch(section, -1) {
		if _, ok := ours[name[1]]; ok {
			order = append(order, name[1])
		}
		if name[2] == "" || len(order) == 0 {
			continue
		}
		if _, err := os.Stat(filepath.Join(product, order[len(order)-1], name[1])); err != nil {
			t.Error(err)
		}
	}
	for _, p := range packagesOf() {
		at := slices.Index(order, p)
		if at < 0 || slices.Contains(order[at+1:], p) {
			t.Errorf("the reading order %q lacks %s, or has it twice", order, p)
			continue
		}
		for _, i := range ours[p] {
			if slices.Index(order, i) < at {
				t.Errorf("%s is to be read after %s, which it may import", p, i)
			}
		}
	}
}

// testsOf lists the tests of a package by its directory, relative to the product's:
// "snapshotter", "tests/noharm".
func testsOf(t *testing.T) map[string][]string {
	t.Helper()
	all := map[string][]string{}
	err := filepath.WalkDir(product, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(text, []byte("func Test")) {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, text, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		dir, err := filepath.Rel(product, filepath.Dir(path))
		for _, decl := range f.Decls {
			if fn, ok := decl.(*ast.FuncDecl); ok && fn.Recv == nil && strings.HasPrefix(fn.Name.Name, "Test") {
				all[dir] = append(all[dir], fn.Name.Name)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// TestTablesNameTests: each test that a row of design.md's tables names is in the
// package that the row names last before it. In the table of what may be done to a
// layer, that is internal/seal unless the row names another.
func TestTablesNameTests(t *testing.T) {
	all := testsOf(t)
	word := regexp.MustCompile(`Test[A-Z]\w*|[a-z]+(?:/[a-z]+)*`)
	named, section := 0, ""
	for row := range strings.Lines(document(t, "docs/design.md")) {
		if title, ok := strings.CutPrefix(row, "## "); ok {
			section = strings.TrimSpace(title)
		}
		cells := strings.Split(strings.TrimSuffix(strings.TrimSpace(row), "|"), "|")
		if !strings.HasPrefix(row, "|") {
			continue
		}
		dir := ""
		if section == "What may be done to a committed layer" {
			dir = "internal/seal"
		}
		for _, w := range word.FindAllString(cells[len(cells)-1], -1) {
			if !strings.HasPrefix(w, "Test") {
				if all[w] != nil {
					dir = w
				}
				continue
			}
			if named++; !slices.Contains(all[dir], w) {
				t.Errorf("a table names %s in package %q, which has no such test: %s", w, dir, row)
			}
		}
	}
	if named < 150 {
		t.Errorf("only %d tests were found in the tables", named)
	}
}

// TestContributingNamesTests: CONTRIBUTING.md's table has a row for each package of
// tests, and the tests in it exist.
func TestContributingNamesTests(t *testing.T) {
	all := testsOf(t)
	rows := regexp.MustCompile("(?m)^\\| `([a-z]+)` \\|.*$").FindAllStringSubmatch(document(t, "CONTRIBUTING.md"), -1)
	listed := map[string]bool{"cmd": true} // the demonstration
	for _, row := range rows {
		listed[row[1]] = true
		for _, name := range regexp.MustCompile(`Test[A-Z]\w*`).FindAllString(row[0], -1) {
			if !slices.Contains(all["tests/"+row[1]], name) {
				t.Errorf("CONTRIBUTING.md names %s in %s, which has no such test", name, row[1])
			}
		}
	}
	entries, err := os.ReadDir(tests)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.IsDir() && !strings.HasPrefix(e.Name(), ".") && !listed[e.Name()] {
			t.Errorf("CONTRIBUTING.md does not list tests/%s", e.Name())
		}
		delete(listed, e.Name())
	}
	for name := range listed {
		t.Errorf("CONTRIBUTING.md lists tests/%s, which is not there", name)
	}
}

// TestLinks: each link in a document to a file, or to a section of one, leads there.
func TestLinks(t *testing.T) {
	sections := map[string]map[string]bool{}
	links := 0
	err := filepath.WalkDir(product, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && path != product && strings.HasPrefix(d.Name(), ".") {
			return fs.SkipDir
		}
		if err == nil && strings.HasSuffix(path, ".md") {
			var text []byte
			if text, err = os.ReadFile(path); err == nil {
				sections[filepath.Clean(path)] = anchors(string(text))
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for from := range sections {
		text := document(t, strings.TrimPrefix(from, product+"/"))
		for _, link := range regexp.MustCompile(`\]\(([^):]+)\)`).FindAllStringSubmatch(text, -1) {
			links++
			file, section, deep := strings.Cut(link[1], "#")
			to := from
			if file != "" {
				to = filepath.Join(filepath.Dir(from), file)
			}
			if _, err := os.Stat(to); err != nil {
				t.Errorf("%s: %s: %v", from, link[1], err)
			} else if deep && !sections[to][section] {
				t.Errorf("%s: %s: there is no such section", from, link[1])
			}
		}
	}
	if links < 60 {
		t.Errorf("only %d links were found", links)
	}
}

// anchors are the names that the titles of a document have in links, as GitHub makes them.
func anchors(text string) map[string]bool {
	all := map[string]bool{}
	for _, title := range regexp.MustCompile("(?m)^#+ (.*)$").FindAllStringSubmatch(text, -1) {
		name := regexp.MustCompile(`[^a-z0-9_ -]`).ReplaceAllString(strings.ToLower(title[1]), "")
		all[strings.ReplaceAll(name, " ", "-")] = true
	}
	return all
}
