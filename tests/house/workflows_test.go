package house

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// workflow is what the test reads of a workflow of GitHub.
type workflow struct {
	Permissions map[string]string
	Jobs        map[string]struct {
		Strategy struct {
			Matrix struct{ Include []step }
		}
		Steps []step
	}
}

type step struct{ Uses, Run string }

var (
	makeTarget = regexp.MustCompile(`(?m)^([a-z][a-z-]*):.*?## `)
	makeValue  = regexp.MustCompile(`(?m)^([A-Z]+) *\??= `)
	makeCall   = regexp.MustCompile(`\bmake +([^;&|\n]+)`)
	pinned     = regexp.MustCompile(`uses: [\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d`)
)

// TestWorkflows: what the workflows call exists, the variables that they set are those of the
// Makefile, actions are pinned by commit, and .ci/run is what a change must pass.
func TestWorkflows(t *testing.T) {
	makefile := document(t, "Makefile")
	known, values := map[string]bool{}, map[string]bool{}
	for _, m := range makeTarget.FindAllStringSubmatch(makefile, -1) {
		known[m[1]] = true
	}
	for _, m := range makeValue.FindAllStringSubmatch(makefile, -1) {
		values[m[1]] = true
	}
	called := map[string]bool{}
	calls := func(file, command string) {
		for _, m := range makeCall.FindAllStringSubmatch(command, -1) {
			for _, word := range strings.Fields(m[1]) {
				name, _, isValue := strings.Cut(word, "=")
				if isValue && !values[name] || !isValue && !known[name] {
					t.Errorf("%s: make has no %q", file, name)
				}
				called[name] = true
			}
		}
	}
	files, err := filepath.Glob(filepath.Join(product, ".github/workflows/*.yml"))
	if err != nil || len(files) == 0 {
		t.Fatalf("workflows %v, %v", files, err)
	}
	runs := map[string]string{}
	for _, path := range files {
		file := filepath.Base(path)
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var w workflow
		if err := yaml.Unmarshal(text, &w); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		if len(w.Permissions) != 1 || w.Permissions["contents"] != "read" {
			t.Errorf("%s: permissions %v", file, w.Permissions)
		}
		if uses := strings.Count(string(text), "uses: "); len(pinned.FindAllString(string(text), -1)) != uses {
			t.Errorf("%s: not each of %d actions is pinned by commit, with its version", file, uses)
		}
		for name, job := range w.Jobs {
			if len(job.Steps) == 0 {
				t.Errorf("%s: job %s has no steps", file, name)
			}
			for _, s := range append(job.Strategy.Matrix.Include, job.Steps...) {
				calls(file, s.Run)
				runs[file] += s.Run + "\n"
			}
		}
	}
	if !strings.Contains(runs["ci.yml"], " .ci/run\n") {
		t.Errorf("ci.yml does not run .ci/run:\n%s", runs["ci.yml"])
	}
	calls(".ci/run", document(t, ".ci/run"))
	for _, target := range []string{"lint", "test", "test-crash", "test-every", "storm", "test-matrix", "test-node", "test-images", "test-packages", "fuzz", "govulncheck", "dist"} {
		if !called[target] {
			t.Errorf("no workflow calls make %s", target)
		}
	}
}
