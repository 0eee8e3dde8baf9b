package main

import (
	"path/filepath"
	"slices"
	"testing"
)

func TestParse(t *testing.T) {
	o, out, name, err := parse([]string{"--images", "tiny", "--igzip", "no,yes", "--unpacks", "1,3", "--fs", "xfs", "--disk", "250", "--neighbor", "400", "--profiles", "p"})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(o.Images, []string{"tiny"}) || !slices.Equal(o.Igzip, []bool{false, true}) || !slices.Equal(o.Unpacks, []int{1, 3}) ||
		o.Rounds != 10 || o.Scale != 1 || o.Neighbor != 400e6 || len(o.Variants) != 6 || !filepath.IsAbs(o.Profiles) {
		t.Errorf("%+v", o)
	}
	if want := "bench run --disk 250 --fs xfs --igzip no,yes --images tiny --neighbor 400 --unpacks 1,3"; o.Command != want {
		t.Errorf("command %q, want %q", o.Command, want)
	}
	if name != "xfs-250-neighbor" || filepath.Base(out) != "bench" || !filepath.IsAbs(o.Store) {
		t.Errorf("name %q, out %q, store %q", name, out, o.Store)
	}
	o, _, name, err = parse([]string{"--fetched"})
	if err != nil || !o.Fetched || name != "ext4-fast-fetched" || o.Command != "bench run --fetched=true" {
		t.Errorf("%+v, %q, %v", o, name, err)
	}
	calls, _, name, err := parsePaths([]string{"--snapshots", "100,200", "--depths", "1"})
	if err != nil || !slices.Equal(calls.Snapshots, []int{100, 200}) || calls.Rounds != 200 || name != "paths-ext4" || calls.Command != "bench paths --depths 1 --snapshots 100,200" {
		t.Errorf("%+v, %q, %v", calls, name, err)
	}
	for _, args := range [][]string{{"x"}, {"--snapshots", "3"}, {"--depths", "0"}, {"--rounds", "0"}} {
		if _, _, _, err := parsePaths(args); err == nil {
			t.Errorf("%q is accepted", args)
		}
	}
	for _, args := range [][]string{{"x"}, {"--igzip", "maybe"}, {"--unpacks", "0"}, {"--rounds", "0"}, {"--neighbor", "-1"}} {
		if _, _, _, err := parse(args); err == nil {
			t.Errorf("%q is accepted", args)
		}
	}
}
