package kit

import (
	"flag"
	"strconv"
)

// Parallel lets n tests of a package run at a time, of those that call t.Parallel, however
// many processors there are: most tests wait for daemons and disks more than they compute.
// TestMain calls it.
func Parallel(n int) {
	flag.Parse()
	if err := flag.Set("test.parallel", strconv.Itoa(n)); err != nil {
		panic(err) // only a test binary has the flag
	}
}
