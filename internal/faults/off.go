//go:build !faults

package faults

// Enabled reports whether this binary was built with the tag "faults".
const Enabled = false

// Point does nothing in a release binary.
func Point(Name) {}

// Mutant is false in a release binary.
func Mutant(string) bool { return false }
