package count

import (
	"path/filepath"
	"slices"
)

// order is the depth-first order of first use: a file stands before the files
// that it uses, in the order in which it uses them first, unless one of those
// leads back to it. The search begins with the package's face, which is the file
// named like the package, or else the first in the alphabet.
func order(pkg string, names []string, uses map[string][]string) []string {
	var done []string
	visited := map[string]bool{}
	var visit func(string)
	visit = func(file string) {
		if visited[file] {
			return
		}
		visited[file] = true
		for _, f := range uses[file] {
			visit(f)
		}
		done = append(done, file)
	}
	if face := filepath.Base(pkg) + ".go"; slices.Contains(names, face) {
		visit(face)
	}
	for _, f := range slices.Sorted(slices.Values(names)) {
		visit(f)
	}
	slices.Reverse(done) // whatever a file uses was done before it
	return done
}
