// Package gunzip decompresses gzip (RFC 1952, and deflate, RFC 1951), in more than twice
// the speed of the libraries that there are for Go: it is most of the processor time of a
// pull. BenchmarkReader has it beside them.
//
//	reader.go   members: header, checksum, the next one
//	blocks.go   deflate: blocks, and the loop that decodes them
//	table.go    the tables of that loop
//
// It refuses what github.com/klauspost/compress/gzip refuses, which containerd has; the
// tests compare the two.
package gunzip
