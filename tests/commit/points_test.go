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
// package that holds them is internal to the other module: those that a function
// there lists, All or Healing, in its order. A constant that both forget is an
// error: it would never be visited.
func killPoints(t *testing.T, list string) []string {
	t.Helper()
	file := must[*ast.File](t)(parser.ParseFile(token.NewFileSet(), filepath.Join(product(t), "internal/faults/points.go"), nil, 0))
	values, lists := map[string]string{}, map[string][]string{}
	for _, decl := range file.Decls {
		switch decl := decl.(type) {
		case *ast.GenDecl:
			for _, spec := range decl.Specs {
				v, ok := spec.(*ast.ValueSpec)
				if !ok {
					continue
				}
				if typ, ok := v.Type.(*ast.Ident); ok && typ.Name == "Name" {
					values[v.Names[0].Name] = must[string](t)(strconv.Unquote(v.Values[0].(*ast.BasicLit).Value))
				}
			}
		case *ast.FuncDecl:
			ast.Inspect(decl, func(n ast.Node) bool {
				if n, ok := n.(*ast.CompositeLit); ok {
					for _, e := range n.Elts {
						lists[decl.Name.Name] = append(lists[decl.Name.Name], e.(*ast.Ident).Name)
					}
				}
				return true
			})
		}
	}
	var names []string
	listed := map[string]bool{}
	for function, idents := range lists {
		for _, ident := range idents {
			value, ok := values[ident]
			if !ok {
				t.Fatalf("points.go: %s lists %s, which is no constant of type Name with a value of its own", function, ident)
			}
			if function == list {
				names = append(names, value)
			}
			listed[ident] = true
		}
	}
	for ident := range values {
		if !listed[ident] {
			t.Fatalf("points.go: nothing lists %s", ident)
		}
	}
	if len(names) == 0 {
		t.Fatalf("points.go: %s lists no kill points", list)
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
