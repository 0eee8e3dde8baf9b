package defects_test

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/defects"
)

// TestNames: every defect is used by a test, and the crash tests use no defect that does
// not exist. The other packages get the latter from [defects.Activate].
func TestNames(t *testing.T) {
	names := defects.Names()
	for _, m := range lab.Mutants() {
		if !slices.Contains(names, m.Name) {
			t.Errorf("the crash tests have a mutant %q, which is no defect", m.Name)
		}
	}
	used := literals(t, "..")
	for _, name := range names {
		if !used[name] {
			t.Errorf("no test uses the defect %q", name)
		}
	}
}

// TestProductHasNone: the source of the product does not contain the name of a defect, of
// the variable that activates it, or of the switch.
func TestProductHasNone(t *testing.T) {
	names := append(defects.Names(), defects.Env, "planted(")
	files := 0
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (path == "../../tests" || strings.HasPrefix(d.Name(), ".") && d.Name() != "..") {
			return filepath.SkipDir
		}
		if filepath.Ext(path) != ".go" {
			return nil
		}
		files++
		text, err := os.ReadFile(path)
		for _, name := range names {
			if bytes.Contains(text, []byte(name)) {
				t.Errorf("%s contains %q", path, name)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if files < 100 {
		t.Errorf("only %d files were searched", files)
	}
}

// TestActivateRefusesUnknownNames: a test with a misspelled name does not run without a
// defect.
func TestActivateRefusesUnknownNames(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("Activate accepts a name that does not exist")
		}
	}()
	defects.Activate("no-such-defect")
}

// literals returns the string literals of all packages of the tests but this one.
func literals(t *testing.T, dir string) map[string]bool {
	t.Helper()
	found := map[string]bool{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == "defects" || d.Name() == "testdata" || strings.HasPrefix(d.Name(), ".") && path != dir) {
			return filepath.SkipDir
		}
		if filepath.Ext(path) != ".go" {
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			if l, ok := n.(*ast.BasicLit); ok && l.Kind == token.STRING {
				if s, err := strconv.Unquote(l.Value); err == nil {
					found[s] = true
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
