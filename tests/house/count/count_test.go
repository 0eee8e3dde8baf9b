package count

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// TestLoad counts a package whose numbers are known.
func TestLoad(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"go.mod": "module example.com/pond\n\ngo 1.24\n",
		"pond.go": `package pond

import "sync"

type Pond struct {
	mu    sync.Mutex
	ducks []duck
}

func New() *Pond { return &Pond{} }

func (p *Pond) Add() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ducks = append(p.ducks, hatch(p))
}
`,
		"duck.go": `package pond

import "sync"

var quacking *sync.RWMutex

type duck struct {
	home *Pond
	feet int
}

func hatch(p *Pond) duck { return duck{home: p, feet: feet} }

func (d duck) quack() {}
`,
		"all.go":       "package pond\n\nconst feet = 2\n",
		"pond_test.go": "package pond\n\nfunc (p *Pond) onlyInTests() {}\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	all, err := Load(dir, "", "./...")
	if err != nil || len(all) != 1 {
		t.Fatal(all, err)
	}
	p := all[0]
	if p.Path != "example.com/pond" || p.Lines != 16+14+3 {
		t.Errorf("%s has %d lines", p.Path, p.Lines)
	}
	if typ, methods := p.MostMethods(); typ != "Pond" && typ != "duck" || methods != 1 || len(p.Methods) != 2 {
		t.Errorf("methods: %v", p.Methods)
	}
	if longest := p.Longest(); longest != (Func{"Pond.Add", "pond.go", 5}) {
		t.Errorf("the longest function is %+v", longest)
	}
	if want := []string{"mu", "quacking"}; !slices.Equal(p.Locks, want) {
		t.Errorf("locks %q, want %q", p.Locks, want)
	}
	// pond.go is the face; all.go would be first in the alphabet.
	if want := []string{"pond.go", "duck.go", "all.go"}; !slices.Equal(p.Files, want) {
		t.Errorf("files %q, want %q", p.Files, want)
	}
	if want := []Arrow{{"pond.go", "duck.go"}, {"duck.go", "pond.go"}, {"duck.go", "all.go"}}; len(p.Arrows) != len(want) {
		t.Errorf("arrows %v, want %v", p.Arrows, want)
	}
	if want := []Arrow{{"duck.go", "pond.go"}}; !slices.Equal(p.Up, want) {
		t.Errorf("arrows that run back up: %v, want %v", p.Up, want)
	}
}
