// Package kittest makes package kit short to use in tests: what kit returns an
// error for ends the test here, and what a test starts ends with the test.
//
// [Must] and [Check] unwrap results, [WaitFor] polls, [Scratch] is a directory
// with a short name, [NewDisk], [StartDaemon] and [StartNode] are kit's, closed
// and stopped after the test, and [Binaries] and [Images] are built once for all
// tests of a package. A test package gives the names it uses often a shorter one in its
// main_test.go:
//
//	var check = kittest.Check
//
//	func must[T any](t testing.TB) func(T, error) T { return kittest.Must[T](t) }
package kittest
