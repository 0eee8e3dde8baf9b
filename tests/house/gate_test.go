package house

import (
	"errors"
	"go/ast"
	"go/token"
	"go/types"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/tools/go/packages"
)

// gatePackage is the only way to write: its functions decide what a failure means.
const gatePackage = module + "/internal/gate"

// syncs are the functions whose error may mean that the kernel could not write.
var syncs = map[string][]string{
	module + "/fsync":           {"Busy", "Dir", "File", "MkdirAll", "OpenCursor", "Overwrite", "Rename", "Replace", "Sync", "Wait", "WriteFile"},
	module + "/storage":         {"Rewrite", "Spend", "Update", "WithTransaction"},
	module + "/internal/layout": {"OverwriteRecord", "PlaceAgain", "ReplaceRecordOnce", "ReplaceRecordSync", "WriteRecord"},
}

// outside may sync without the gate, for a reason.
var outside = map[string]string{
	"snapshotter.New":           "before the gate exists: an error ends the start",
	"internal/rebuild.Database": "there is no database: an error ends the rebuild, and the old files are still there",
}

// TestOneDoor: every call that syncs, or runs a transaction, happens inside a function
// that was given to the gate. Followed are all calls between our functions: one that
// syncs outside of the gate must only be called by functions that are inside.
func TestOneDoor(t *testing.T) {
	for _, around := range goingAround(t, nil) {
		t.Error(around)
	}
}

// TestOneDoorSees: the test above finds a write that goes around the gate: in a method,
// behind another function, and in the background.
func TestOneDoorSees(t *testing.T) {
	dir, err := filepath.Abs("../../snapshotter")
	if err != nil {
		t.Fatal(err)
	}
	const file = `package snapshotter

import "github.com/durable-snapshotter/durable-snapshotter/fsync"

func (s *Snapshotter) Around() error { return fsync.Dir("/") }

func (s *Snapshotter) Behind() error { return helper() }

func helper() error { return fsync.Dir("/") }

func (s *Snapshotter) Background() { s.running.Go(func() { _ = helper() }) }

func (s *Snapshotter) Through() error { return s.gate.Do(s.background, helper) }

func (s *Snapshotter) Inside() error { return s.gate.Do(s.background, func() error { return helper() }) }
`
	found := strings.Join(goingAround(t, map[string][]byte{filepath.Join(dir, "around.go"): []byte(file)}), "\n")
	for _, name := range []string{"Around", "Behind", "Background"} {
		if !strings.Contains(found, "."+name+" ") {
			t.Errorf("%s is not found", name)
		}
	}
	for _, name := range []string{"Through", "Inside"} {
		if strings.Contains(found, "."+name+" ") {
			t.Errorf("%s is taken for one that goes around the gate", name)
		}
	}
}

// calls are what one function does outside of the gate.
type calls struct {
	at         token.Position
	callees    []*types.Func
	background []*types.Func // in functions that it starts
}

// goingAround returns a line for each function that may sync without the gate.
func goingAround(t *testing.T, overlay map[string][]byte) (found []string) {
	t.Helper()
	all, err := packages.Load(&packages.Config{
		Mode: packages.NeedName | packages.NeedSyntax | packages.NeedTypes | packages.NeedTypesInfo | packages.NeedImports | packages.NeedDeps | packages.NeedModule,
		Dir:  "../..", Context: t.Context(), Overlay: overlay,
	}, "./...")
	if err != nil {
		t.Fatal(err)
	}
	functions := map[string]*calls{}
	for _, p := range all {
		for _, e := range p.Errors {
			t.Fatal(errors.New("load the product: " + e.Error()))
		}
		if p.PkgPath == gatePackage || syncs[p.PkgPath] != nil {
			continue
		}
		for _, f := range p.Syntax {
			for _, d := range f.Decls {
				if fn, ok := d.(*ast.FuncDecl); ok && fn.Body != nil {
					functions[p.TypesInfo.Defs[fn.Name].(*types.Func).FullName()] = outsideCalls(p, fn)
				}
			}
		}
	}
	// Which functions sync, themselves or through others.
	reaches := map[string]string{}
	reason := func(callees []*types.Func) string {
		for _, callee := range callees {
			if slices.Contains(syncs[path(callee)], callee.Name()) {
				return callee.FullName()
			}
			if why := reaches[callee.FullName()]; why != "" {
				return callee.FullName() + ", " + why
			}
		}
		return ""
	}
	for again := true; again; {
		again = false
		for name, c := range functions {
			if why := reason(c.callees); why != "" && reaches[name] == "" && outside[short(name)] == "" {
				reaches[name], again = why, true
			}
		}
	}
	for name, c := range functions {
		why := reason(c.background)
		if parts := strings.Split(name, "."); ast.IsExported(parts[len(parts)-1]) && why == "" {
			why = reaches[name]
		}
		if why != "" {
			found = append(found, strings.ReplaceAll(c.at.String()+": "+name+" goes around the gate: "+why, module+"/", ""))
		}
	}
	slices.Sort(found)
	return found
}

func path(f *types.Func) string {
	if f.Pkg() == nil {
		return ""
	}
	return f.Pkg().Path()
}

// short is a function's name without the module and the receiver's punctuation.
func short(name string) string {
	return strings.TrimPrefix(name, module+"/")
}

// outsideCalls collects the calls of a function that are not inside of the gate.
func outsideCalls(p *packages.Package, fn *ast.FuncDecl) *calls {
	c := &calls{at: p.Fset.Position(fn.Pos())}
	literals := map[types.Object]*ast.FuncLit{} // local variables that are functions
	inside := map[ast.Node]bool{}
	started := map[ast.Node]bool{}
	mark := func(into map[ast.Node]bool, args []ast.Expr) {
		for _, arg := range args {
			switch arg := arg.(type) {
			case *ast.FuncLit:
				into[arg] = true
			case *ast.Ident:
				if l := literals[p.TypesInfo.Uses[arg]]; l != nil {
					into[l] = true
				}
			}
		}
	}
	ast.Inspect(fn, func(n ast.Node) bool {
		if a, ok := n.(*ast.AssignStmt); ok && len(a.Lhs) == len(a.Rhs) {
			for i, rhs := range a.Rhs {
				if l, ok := rhs.(*ast.FuncLit); ok {
					if id, ok := a.Lhs[i].(*ast.Ident); ok {
						literals[p.TypesInfo.ObjectOf(id)] = l
					}
				}
			}
		}
		return true
	})
	ast.Inspect(fn, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.CallExpr:
			callee := calleeOf(p, n)
			switch {
			case callee == nil:
			case path(callee) == gatePackage, path(callee) == module+"/storage" && callee.Name() == "BeforeCommit":
				// What BeforeCommit is given runs in a transaction, which the gate runs.
				mark(inside, n.Args)
			case callee.FullName() == "(*sync.WaitGroup).Go":
				mark(started, n.Args)
			}
		case *ast.GoStmt:
			mark(started, []ast.Expr{n.Call.Fun})
		}
		return true
	})
	var walk func(n ast.Node, background bool)
	walk = func(n ast.Node, background bool) {
		ast.Inspect(n, func(m ast.Node) bool {
			if m == nil || m == n {
				return true
			}
			if inside[m] {
				return false
			}
			if started[m] {
				walk(m, true)
				return false
			}
			if call, ok := m.(*ast.CallExpr); ok {
				if callee := calleeOf(p, call); callee != nil && background {
					c.background = append(c.background, callee)
				} else if callee != nil {
					c.callees = append(c.callees, callee)
				}
			}
			return true
		})
	}
	walk(fn.Body, false)
	return c
}

func calleeOf(p *packages.Package, call *ast.CallExpr) *types.Func {
	var id *ast.Ident
	switch fun := ast.Unparen(call.Fun).(type) {
	case *ast.Ident:
		id = fun
	case *ast.SelectorExpr:
		id = fun.Sel
	default:
		return nil
	}
	f, _ := p.TypesInfo.Uses[id].(*types.Func)
	return f
}
