package overlayutil

import (
	"testing"

	"github.com/containerd/errdefs"
)

func TestCheckOptions(t *testing.T) {
	for option, ok := range map[string]bool{
		"index=off": true, "userxattr": true, "xino=auto": true,
		"volatile": false, "upperdir=/x": false, "workdir=/x": false, "lowerdir=/x": false, "lowerdir+=/x": false,
		"": false, "index=off,volatile": false,
	} {
		err := CheckOptions([]string{option})
		if ok && err != nil || !ok && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", option, err)
		}
	}
}
