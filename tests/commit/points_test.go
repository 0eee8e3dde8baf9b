package commit

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// product returns the directory of the module under test.
func product(t *testing.T) string {
	t.Helper()
	return filepath.Dir(must[string](t)(kit.Module()))
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
