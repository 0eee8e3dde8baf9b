package overlayutil

import (
	"testing"
)

func TestProbeX(t *testing.T) {
	for _, s := range []Space{Trusted, User} {
		f, err := Probe("/var/tmp", s)
		t.Logf("%+v %v", f, err)
	}
}
