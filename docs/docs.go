// Package docs holds the documents that the program itself prints from, so that a text stands
// in one place.
package docs

import _ "embed"

// Containerd is containerd.md, with the configuration texts for each platform.
//
//go:embed containerd.md
var Containerd string
