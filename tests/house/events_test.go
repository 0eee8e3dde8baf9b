package house

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// TestLogEvents: design.md lists each value of the log field "event" once, and no other.
// The field has a constant value; text in capitals, which alerts had to match before, is
// not logged.
func TestLogEvents(t *testing.T) {
	_, section, _ := strings.Cut(document(t, "docs/design.md"), "\n## Log events\n")
	section, _, _ = strings.Cut(section, "\n## ")
	listed := map[string]int{}
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\|").FindAllStringSubmatch(section, -1) {
		listed[row[1]]++
	}
	logged := map[string]bool{}
	for at, value := range eventsOf(t) {
		if !regexp.MustCompile(`^[a-z]+(_[a-z]+)+$`).MatchString(value) {
			t.Errorf("%s: the value of the field event is %q", at, value)
			continue
		}
		logged[value] = true
		if listed[value] != 1 {
			t.Errorf("%s: design.md lists the event %q %d times", at, value, listed[value])
		}
	}
	for value := range listed {
		if !logged[value] {
			t.Errorf("design.md lists the event %q, which is not logged", value)
		}
	}
	if len(logged) == 0 {
		t.Error("no event was found in the source")
	}
}

// eventsOf returns the values of the log field "event" in the product, by position: what
// follows the literal "event" in a call or in a composite literal. A value that is no
// literal is empty.
func eventsOf(t *testing.T) map[string]string {
	t.Helper()
	found := map[string]string{}
	literal := func(e ast.Expr) string {
		if l, ok := e.(*ast.BasicLit); ok && l.Kind == token.STRING {
			s, _ := strconv.Unquote(l.Value)
			return s
		}
		return ""
	}
	err := filepath.WalkDir(product, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == "tests" || d.Name() == "testdata" || strings.HasPrefix(d.Name(), ".") && path != product) {
			return filepath.SkipDir
		}
		if filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.CallExpr:
				if f, ok := n.Fun.(*ast.SelectorExpr); ok && f.Sel.Name == "WithField" && literal(n.Args[0]) == "event" {
					found[fset.Position(n.Pos()).String()] = literal(n.Args[1])
				}
			case *ast.KeyValueExpr:
				if literal(n.Key) == "event" {
					found[fset.Position(n.Pos()).String()] = literal(n.Value)
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}
