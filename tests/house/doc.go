// Package house holds the source of the project to its own rules: what imports
// what, how large things may become, and that the documents name what is there.
// Its tests read source and start nothing.
//
//	go test -count=1 ./house
package house
