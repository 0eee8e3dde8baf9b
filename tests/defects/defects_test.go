package defects

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
)

// TestBuild: all edits find their lines, and the result compiles.
func TestBuild(t *testing.T) {
	if _, err := Build(); err != nil {
		t.Error(err)
	}
}

// TestPlantFailsLoudly: an edit whose lines are not in the product, or there twice, or
// replaced by another edit, ends the build, and the error names the file and the lines.
func TestPlantFailsLoudly(t *testing.T) {
	root := t.TempDir()
	if err := os.Mkdir(filepath.Join(root, "p"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "p/p.go"), []byte("package p\n\nfunc f() {\n\tg()\n\th()\n\th()\n\tif true {\n\t\tg()\n\t}\n}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	plant := func(functions fstest.MapFS, olds ...string) (string, error) {
		var edits []Edit
		for _, old := range olds {
			edits = append(edits, Edit{File: "p/p.go", Old: old, New: "\tif !planted(\"x\") {\n\t\tg()\n\t}"})
		}
		replace, err := plant(root, functions, t.TempDir(), edits)
		text, _ := os.ReadFile(replace[filepath.Join(root, "p/p.go")])
		return string(text), err
	}
	text, err := plant(fstest.MapFS{"p/planted.go": {Data: []byte("package p\n")}}, "\tg()")
	if err != nil {
		t.Error(err)
	}
	if want := "func f() {\n\tif !planted(\"x\") {\n\t\tg()\n\t}\n\th()\n\th()\n\tif true {\n\t\tg()\n\t}\n}\n"; !strings.HasSuffix(text, want) {
		t.Errorf("the edited file is\n%s", text)
	}
	for name, olds := range map[string][]string{
		"not there":        {"\tgone()"},
		"twice":            {"\th()"},
		"part of a line":   {"g()"},
		"edited by others": {"\tg()", "\tg()\n\th()"},
	} {
		_, err := plant(nil, olds...)
		if last := olds[len(olds)-1]; err == nil || !strings.Contains(err.Error(), "p/p.go") || !strings.Contains(err.Error(), last) {
			t.Errorf("an edit of lines that are %s: %v", name, err)
		}
	}
	if _, err := plant(fstest.MapFS{"q/planted.go": {Data: []byte("package q\n")}}, "\tg()"); err == nil || !strings.Contains(err.Error(), "q/planted.go") {
		t.Errorf("functions for a package without edits: %v", err)
	}
}
