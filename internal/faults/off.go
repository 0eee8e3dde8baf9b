//go:build !faults

package faults

// Enabled reports whether this binary was built with the tag "faults".
const Enabled = false

// Point does nothing in a release binary.
func Point(Name) {}
