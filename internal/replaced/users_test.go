package replaced

import (
	"testing"
)

func TestNamesLayer(t *testing.T) {
	for options, want := range map[string][2]uint64{ // names 12: 1 or 0; upper
		"rw,lowerdir=/r/snapshots/12/fs:/r/snapshots/3/fs,upperdir=/r/snapshots/40/fs,workdir=/r/snapshots/40/work": {1, 40},
		"rw,lowerdir=/r/snapshots/112/fs:/r/snapshots/3/fs,upperdir=/r/snapshots/40/fs,workdir=/x":                  {0, 40},
		"rw,index=off,workdir=40/work,upperdir=40/fs,lowerdir=3/fs:12/fs":                                           {1, 40},
		"ro,lowerdir+=/r/snapshots/3/fs,lowerdir+=/r/snapshots/12/fs":                                               {1, 0},
		"ro,lowerdir=/r/snapshots/3/fs:/r/snapshots/4/fs":                                                           {0, 0},
		"rw,lowerdir=3/fs,upperdir=/r/12/fs":                                                                        {1, 12},
		"rw":                                                                                                        {1, 0}, // hidden
		"rw,lowerdir=3/fs,upperdir=/r/99999999999999999999/fs":                                                      {0, 0}, // no number of ours
		"rw,lowerdir=/var/lib/docker/overlay2/l/ABC:/x":                                                             {0, 0},
	} {
		if names := namesLayer(options, 12); names != (want[0] == 1) {
			t.Errorf("%s: names 12: %v", options, names)
		}
		if upper := upperOf(options); upper != want[1] {
			t.Errorf("%s: writes to %d", options, upper)
		}
	}
}
