package kittest

import "os"

// Every is whether tests leave nothing out of what they enumerate, as make test-every
// asks. make test takes a part of each enumeration, always the same.
func Every() bool { return os.Getenv("DURABLE_TEST_EVERY") != "" }

// Turn is whether i is to be visited where make test visits every n-th, from the first on.
func Turn(i, n int) bool { return Every() || i%n == 0 }

// Step is the distance of what is visited where make test visits every n-th.
func Step(n int) int {
	if Every() {
		return 1
	}
	return n
}
