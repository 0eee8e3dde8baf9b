//go:build tools

// Package programs is a module of its own from which the tests build BuildKit. The
// tests' own module stays free of its dependencies.
package programs

import (
	_ "github.com/moby/buildkit/cmd/buildctl"
	_ "github.com/moby/buildkit/cmd/buildkitd"
)
