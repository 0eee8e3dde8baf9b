package idle

import (
	"fmt"
	"runtime/debug"
)

// Contain makes an error out of a panic in fn. Work in the background reads what
// images bring, with libraries of others: what ends in a panic must end that work
// and not the daemon, which would start again, and do the same again.
func Contain(fn func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return fn()
}
