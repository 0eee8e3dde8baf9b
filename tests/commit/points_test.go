package commit

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// product returns the directory of the module under test.
func product(t *testing.T) string {
	t.Helper()
	return filepath.Dir(must[string](t)(kit.Module(t.Context())))
}

// killPoints reads the names of the kill points from the source, because the
// package that holds them is internal to the other module. The order is that of
// All, and a constant that All forgets is an error: it would never be visited.
func killPoints(t *testing.T) []string {
	t.Helper()
	file := must[*ast.File](t)(parser.ParseFile(token.NewFileSet(), filepath.Join(product(t), "internal/faults/points.go"), nil, 0))
	values := map[string]string{}
	var all []string
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.ValueSpec:
			if typ, ok := n.Type.(*ast.Ident); ok && typ.Name == "Name" {
				values[n.Names[0].Name] = must[string](t)(strconv.Unquote(n.Values[0].(*ast.BasicLit).Value))
			}
		case *ast.FuncDecl:
			if n.Name.Name != "All" {
				return false
			}
		case *ast.CompositeLit:
			for _, e := range n.Elts {
				all = append(all, e.(*ast.Ident).Name)
			}
		}
		return true
	})
	var names []string
	for _, ident := range all {
		value, ok := values[ident]
		if !ok {
			t.Fatalf("points.go: All lists %s, which is no constant of type Name with a value of its own", ident)
		}
		names = append(names, value)
		delete(values, ident)
	}
	for ident := range values {
		t.Fatalf("points.go: All does not list %s", ident)
	}
	if len(names) == 0 {
		t.Fatal("points.go: no kill points found")
	}
	return names
}

// mutants finds the names of the planted defects: the arguments of
// faults.Mutant all over the product.
func mutants(t *testing.T) []string {
	t.Helper()
	var names []string
	check(t, filepath.WalkDir(product(t), func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == "tests" || strings.HasPrefix(d.Name(), ".")) {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			if f, ok := call.Fun.(*ast.SelectorExpr); !ok || f.Sel.Name != "Mutant" {
				return true
			}
			literal, ok := call.Args[0].(*ast.BasicLit)
			if !ok {
				t.Fatalf("%s: a mutant whose name is not a literal", path)
			}
			names = append(names, must[string](t)(strconv.Unquote(literal.Value)))
			return true
		})
		return nil
	}))
	if len(names) == 0 {
		t.Fatal("no mutants found")
	}
	slices.Sort(names)
	return slices.Compact(names)
}
