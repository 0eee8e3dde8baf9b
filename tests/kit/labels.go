package kit

import (
	"fmt"
	"strings"
)

// labelSize is what a value has at most in Labels: key and value may have 4,096 bytes together.
const labelSize = 4000

// Labels are labels with values of so many bytes, for answers and transactions that are to be
// large.
func Labels(bytes int) map[string]string {
	all := map[string]string{}
	for n := 0; bytes > 0; n, bytes = n+1, bytes-labelSize {
		all[fmt.Sprint("large", n)] = strings.Repeat("x", min(bytes, labelSize))
	}
	return all
}
