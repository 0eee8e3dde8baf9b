package overlayutil

import (
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestCheckOptions(t *testing.T) {
	for option, ok := range map[string]bool{
		"index=off": true, "userxattr": true, "xino=auto": true, "nfs_export=off": true, "fsync=strict": true, "uuid=null": true,
		"redirect_dir=nofollow": true, "verity=off": true, "nooverride_creds": true, "default_permissions": true,
		"index=on": false, "nfs_export=on": false, "fsync=volatile": false, "verity=on": false, "verity=require": false,
		"redirect_dir=on": false, "metacopy=on": false, "datadir+=/x": false,
		"volatile": false, "upperdir=/x": false, "workdir=/x": false, "lowerdir=/x": false, "lowerdir+=/x": false,
		"": false, "index=off,volatile": false,
	} {
		err := CheckOptions([]string{option})
		if ok && err != nil || !ok && (!errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), strconv.Quote(option))) {
			t.Errorf("%q: %v", option, err)
		}
	}
}
