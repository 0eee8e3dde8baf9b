package layout

import (
	"slices"
	"testing"
)

// TestRoot: the paths of docs/formats.md, with snapshots/ in the root and apart.
func TestRoot(t *testing.T) {
	for _, c := range []struct {
		root  Root
		want  []string // removing, healing of layer 7, replaced
		areas []string
		area  bool // snapshots/removing is one of ours
	}{
		{Root{Path: "/r"}, []string{"/r/removing", "/r/healing/7.boot", "/r/replaced"}, []string{"/r"}, false},
		{Root{Path: "/r", Apart: true}, []string{"/r/snapshots/removing", "/r/snapshots/healing/7.boot", "/r/snapshots/replaced"},
			[]string{"/r/snapshots", "/r"}, true},
	} {
		r := c.root
		if got := []string{r.Removing(), r.HealingPlace(7, "boot"), r.Replaced()}; !slices.Equal(got, c.want) {
			t.Errorf("%+v: %v, want %v", r, got, c.want)
		}
		if got := r.Areas(); !slices.Equal(got, c.areas) {
			t.Errorf("%+v: areas %v, want %v", r, got, c.areas)
		}
		for _, name := range []string{"removing", "healing", "replaced"} {
			if r.IsArea(name) != c.area {
				t.Errorf("%+v: snapshots/%s is an area: %v", r, name, !c.area)
			}
		}
		same := []string{r.Snapshots(), r.Dir(12), r.Tree(12), r.Empty(), r.SetAside()}
		if want := []string{"/r/snapshots", "/r/snapshots/12", "/r/snapshots/12/fs", "/r/empty", "/r/set-aside"}; !slices.Equal(same, want) {
			t.Errorf("%+v: %v, want %v", r, same, want)
		}
		if r.IsArea("12") || r.IsArea("empty") {
			t.Errorf("%+v: a directory of a snapshot is an area", r)
		}
	}
}

func TestTrees(t *testing.T) {
	for name, want := range map[string]bool{"7": true, "18446744073709551615": true, "007": false, "+7": false, "-7": false, "": false, "new-7": false, "7.boot": false} {
		if _, ok := DirectoryID(name); ok != want {
			t.Errorf("%q is the number of a directory: %v", name, ok)
		}
	}
	for _, c := range []struct {
		name     string
		replaced bool
		want     string
	}{
		{"7", false, ""}, {"7.boot", false, "boot"}, {"7.8f3f-1.x", true, "8f3f-1"}, {"7.boot", true, "boot"}, {"7", true, ""},
	} {
		if got := BootOf(c.name, c.replaced); got != c.want {
			t.Errorf("boot of %q, replaced %v: %q, want %q", c.name, c.replaced, got, c.want)
		}
	}
	if id, err := LayerOf("/r/replaced/7.boot.x"); id != 7 || err != nil {
		t.Errorf("layer %d, %v", id, err)
	}
	if id, err := LayerOf("/r/replaced/notes"); err == nil {
		t.Errorf("no number, and layer %d", id)
	}
}
