package overlayutil

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestProbe compares the probe with what is known of this kernel by other ways:
// mounts of our own with the opposite options.
func TestProbe(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	f, err := Probe(dir, Trusted)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", f)
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if again, err := Probe(dir, Trusted); err != nil || again != f {
		t.Errorf("second probe: %+v, %v", again, err)
	}
	if g := guess(); g.RedirectDir != f.RedirectDir || g.Metacopy != f.Metacopy || g.Index != f.Index || g.IDMappedMounts != f.IDMappedMounts {
		t.Errorf("a guess is %+v", g)
	}
	// inspect must be able to see what the options are there to prevent.
	p := prober{base: t.TempDir(), space: Trusted}
	for _, d := range []string{"merged", "low/opaque", "low/x", "low/renamed", "mid/opaque", "mid/x"} {
		if err := os.MkdirAll(p.path(d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(p.path("low/file"), []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, on := range []bool{true, false} {
		options := f.SelfContained(Trusted)
		if on {
			options = []string{"redirect_dir=on", "metacopy=on"}
		}
		var seen Features
		err := p.mounted(func(merged, upper string) error { return p.inspect(&seen, merged, upper) }, options...)
		if err != nil {
			t.Fatal(err)
		}
		if f.RedirectDir && seen.Redirects != on || f.Metacopy && seen.Metacopies != on {
			t.Errorf("with %v: redirects %v, metacopies %v", options, seen.Redirects, seen.Metacopies)
		}
	}
}

// TestProbeAfterAKill finds a mount of a probe that could not clean up.
func TestProbeAfterAKill(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	p := prober{base: filepath.Join(dir, ".overlay-probe-1234")}
	for _, d := range []string{"merged", "low", "precious"} {
		if err := os.MkdirAll(p.path(d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount(p.path("low"), p.path("merged"), "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := Probe(dir, Trusted); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(mounts), dir) {
		t.Errorf("a mount is left: %v", err)
	}
}

func TestSplit(t *testing.T) {
	for name, want := range map[string][]string{
		"trusted.overlay.opaque":         {string(Trusted), "opaque"},
		"user.overlay.origin":            {string(User), "origin"},
		"trusted.overlay.overlay.opaque": {string(Trusted), "overlay.opaque"},
		"trusted.overlayopaque":          nil,
		"user.other":                     nil,
	} {
		space, attr, ok := Split(name)
		if ok != (want != nil) || ok && !slices.Equal(want, []string{string(space), attr}) {
			t.Errorf("%s: %q, %q, %v", name, space, attr, ok)
		}
	}
}
