// Package defects builds a daemon with planted defects. Each test suite must catch the
// defects that belong to it; a suite that does not proves nothing.
//
// The product contains no defect. A defect is data: an [Edit] names a file of the
// product, the lines that it replaces, and the replacement, which makes the mistake when
// planted("name") is true. Code that is too long for an edit is a function in testdata,
// in the directory of its package. One build contains all defects (go build -overlay).
// The environment variable [Env] activates one of them in a process; without it the
// daemon behaves like one that is built with the tag faults.
//
// The lines of an edit must be in the file exactly once. When the product has changed
// and they are not, the build fails and prints them. Then make the same mistake in the
// new code, and run
//
//	go test ./defects
//	go test ./crash -run TestMutants
//
// and the tests of the other suites that use the defect.
package defects

import (
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"go/format"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// Env is the environment variable that names the active defect.
const Env = "DURABLE_MUTANT"

// Edit replaces lines of the product.
type Edit struct {
	File string // slash-separated, relative to the root of the repository
	Old  string // complete lines, which are in the file exactly once
	New  string // the lines that replace them
}

// edits are all edits. The order does not matter.
var edits = slices.Concat(orderEdits, healEdits, verifyEdits, inheritEdits, containerdEdits)

// functions holds the functions that edits call.
//
//go:embed testdata
var functions embed.FS

// Build compiles the daemon with all defects and with the build tag faults, and returns
// the path of the binary.
var Build = sync.OnceValues(func() (string, error) {
	return BuildAs(context.Background(), "durable-snapshotter-defects", nil)
})

// BuildAs is Build with the name of the binary. It replaces further files: the keys are
// absolute paths of originals, the values those of their replacements.
func BuildAs(ctx context.Context, name string, others map[string]string) (string, error) {
	tests, err := kit.Module()
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp("", "defects")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	sources, err := fs.Sub(functions, "testdata")
	if err != nil {
		return "", err
	}
	replace, err := plant(filepath.Dir(tests), sources, dir, edits)
	if err != nil {
		return "", fmt.Errorf("plant defects: %w", err)
	}
	maps.Copy(replace, others)
	data, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	overlay := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(overlay, data, 0o600); err != nil {
		return "", err
	}
	return kit.BuildDaemon(ctx, name, "-tags", "faults", "-overlay", overlay)
}

// Activate returns the environment setting that activates the named defect, or, for an
// empty name, none. It panics when there is no such defect: a test would search in vain.
func Activate(name string) string {
	if name != "" && !slices.Contains(Names(), name) {
		panic("defects: there is no defect " + name)
	}
	return Env + "=" + name
}

var switched = regexp.MustCompile(`planted\("([^"]+)"\)`)

// Names returns the names of all defects, sorted.
func Names() []string {
	var texts []string
	for _, e := range edits {
		texts = append(texts, e.New)
	}
	err := fs.WalkDir(functions, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := functions.ReadFile(path)
		texts = append(texts, string(text))
		return err
	})
	if err != nil {
		panic(err) // the files are part of this binary
	}
	var names []string
	for _, m := range switched.FindAllStringSubmatch(strings.Join(texts, "\n"), -1) {
		names = append(names, m[1])
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// plant makes the edits in copies of the files below root. It writes the copies, the
// functions and the switches into dir, and returns the overlay: original by replacement.
func plant(root string, functions fs.FS, dir string, edits []Edit) (map[string]string, error) {
	var errs []error
	replace := map[string]string{}
	add := func(name, text string) {
		source, err := format.Source([]byte(text))
		at := filepath.Join(dir, strings.ReplaceAll(name, "/", "_"))
		if err == nil {
			err = os.WriteFile(at, source, 0o600)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
		replace[filepath.Join(root, name)] = at
	}
	ofFile := map[string][]Edit{}
	for _, e := range edits {
		ofFile[e.File] = append(ofFile[e.File], e)
	}
	packages := map[string]string{} // directory: package clause
	for name, all := range ofFile {
		text, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			return nil, err
		}
		clause, err := parser.ParseFile(token.NewFileSet(), name, text, parser.PackageClauseOnly)
		if err != nil {
			return nil, err
		}
		packages[path.Dir(name)] = clause.Name.Name
		edited, err := apply(string(text), all)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		add(name, edited)
	}
	for dir, name := range packages {
		add(dir+"/planted_switch.go", fmt.Sprintf(switchSource, name, Env))
	}
	err := fs.WalkDir(functions, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if packages[path.Dir(name)] == "" {
			return fmt.Errorf("testdata/%s: no edit is in its package", name)
		}
		text, err := fs.ReadFile(functions, name)
		add(name, string(text))
		return err
	})
	return replace, errors.Join(append(errs, err)...)
}

// apply makes edits of one file. Each finds its lines in the original text; two edits
// must not replace the same line.
func apply(text string, edits []Edit) (string, error) {
	var errs []error
	lines := strings.Split(text, "\n")
	replacement := make([]*string, len(lines)) // for the first line of each edit
	replaced := make([]bool, len(lines))
	for _, e := range edits {
		old := strings.Split(strings.Trim(e.Old, "\n"), "\n")
		at, n := 0, 0
		for i := range len(lines) - len(old) + 1 {
			if slices.Equal(lines[i:i+len(old)], old) {
				at = i
				n++
			}
		}
		if n != 1 {
			errs = append(errs, fmt.Errorf("%s contains these lines %d times instead of once, see the comment of package defects:\n%s", e.File, n, e.Old))
			continue
		}
		if slices.Contains(replaced[at:at+len(old)], true) {
			errs = append(errs, fmt.Errorf("%s: another edit replaces these lines, too:\n%s", e.File, e.Old))
			continue
		}
		for i := range old {
			replaced[at+i] = true
		}
		replacement[at] = &e.New
	}
	var out []string
	for i, line := range lines {
		switch {
		case replacement[i] != nil:
			out = append(out, strings.Trim(*replacement[i], "\n"))
		case !replaced[i]:
			out = append(out, line)
		}
	}
	return strings.Join(out, "\n"), errors.Join(errs...)
}

// switchSource is the switch of one package.
const switchSource = `package %s

import "os"

var plantedDefect = os.Getenv(%q)

// planted reports whether the named defect is active.
func planted(name string) bool { return name == plantedDefect }
`
