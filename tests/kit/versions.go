package kit

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Debian is the release that Debian 12 packages, 1.6.20 with patches.
const Debian = "debian"

// Current is the release that tests/go.mod requires, and [Build] builds.
const Current = "2.4.2"

// Releases are those of containerd that the documentation makes a statement on, oldest
// first: the last of every line that the Go module proxy has.
var Releases = []string{Debian, "1.6.36", "1.7.35", "2.0.14", "2.1.9", "2.2.9", "2.3.7", Current}

// Since reports whether a release is not older than another.
func Since(release, other string) bool {
	return slices.Index(Releases, release) >= slices.Index(Releases, other)
}

// ConfigVersion is the newest version of the configuration file that a release reads and
// all later ones do.
func ConfigVersion(release string) int {
	if Since(release, "2.0.14") {
		return 3
	}
	return 2
}

// Release returns b with containerd, ctr and the shim of another release. A shim of a later
// release does not serve a containerd before 2.0, which refuses its answer at the start. The
// first call for a release downloads its sources through the Go module proxy, which Go
// verifies against the checksum database, or Debian's package, and takes minutes; what
// it made stays beside the binaries of [Build] until make clean.
func (b Binaries) Release(ctx context.Context, release string) (Binaries, error) {
	if release == Current {
		return b, nil
	}
	_, bin, unlock, err := binDir("containerd-" + release)
	if err != nil {
		return Binaries{}, err
	}
	defer unlock()
	fill := buildRelease
	if release == Debian {
		fill = unpackDebian
	}
	dir := filepath.Join(bin, "containerd-"+release)
	of := func(program string) string { return filepath.Join(dir, program) }
	b.Dir, b.Containerd, b.Ctr = dir, of("containerd"), of("ctr")
	if _, err := os.Stat(of(shim)); err == nil {
		return b, nil
	}
	err = os.RemoveAll(dir) // of an earlier version, which had no shim
	if err == nil {
		err = appear(dir, func(work string) (string, error) { return fill(ctx, release, work) })
	}
	if err != nil {
		return Binaries{}, fmt.Errorf("get containerd %s: %w", release, err)
	}
	return b, nil
}

const shim = "containerd-shim-runc-v2"

// appear makes a directory, which appears only once it is complete. fill makes it below
// work, which is removed, and returns where.
func appear(dir string, fill func(work string) (string, error)) (err error) {
	work, err := os.MkdirTemp(filepath.Dir(dir), ".build-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	made, err := fill(work)
	if err != nil {
		return err
	}
	return os.Rename(made, dir)
}

// buildRelease compiles a release.
func buildRelease(ctx context.Context, release, work string) (string, error) {
	module := "github.com/containerd/containerd"
	if !strings.HasPrefix(release, "1.") {
		module += "/v2"
	}
	var programs []string
	for _, p := range []string{"containerd", "ctr", shim} {
		programs = append(programs, module+"/cmd/"+p)
	}
	// A module of its own that requires the release: go install refuses the 1.7
	// releases, whose go.mod has exclude directives.
	get := []string{"go", "get"}
	for _, p := range programs {
		get = append(get, p+"@v"+release)
	}
	for _, argv := range [][]string{{"go", "mod", "init", "example.com/containerd"}, get} {
		if _, err := run(ctx, work, []string{"GOWORK=off"}, argv...); err != nil {
			return "", err
		}
	}
	// The tags leave out the snapshotters that need cgo or a program of their own.
	return builtIn(ctx, work, work, "no_aufs,no_btrfs,no_devmapper,no_zfs", programs...)
}

// BuildModule builds programs of a module of its own, a directory of the tests module, into
// a directory beside the binaries of [Build], and returns that. It takes minutes at the
// first call with these go.mod and go.sum.
func BuildModule(ctx context.Context, module string, programs ...string) (string, error) {
	tests, bin, unlock, err := binDir(strings.ReplaceAll(module, "/", "-"))
	if err != nil {
		return "", err
	}
	defer unlock()
	source := filepath.Join(tests, module)
	version, err := sumOf(filepath.Join(source, "go.mod"), filepath.Join(source, "go.sum"))
	if err != nil {
		return "", fmt.Errorf("build %s: %w", module, err)
	}
	dir := filepath.Join(bin, strings.ReplaceAll(module, "/", "-")+"-"+version)
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	err = appear(dir, func(work string) (string, error) { return builtIn(ctx, source, work, "", programs...) })
	if err != nil {
		return "", fmt.Errorf("build %s: %w", module, err)
	}
	return dir, nil
}

// builtIn builds programs of a module into a directory below work.
func builtIn(ctx context.Context, module, work, tags string, programs ...string) (string, error) {
	out := filepath.Join(work, "bin")
	if err := os.Mkdir(out, 0o755); err != nil {
		return "", err
	}
	// One package at a time: other tests run meanwhile.
	return out, goBuild(ctx, module, out+"/", append([]string{"-p", "1", "-tags", tags}, programs...)...)
}

// sumOf is a short digest of files.
func sumOf(files ...string) (string, error) {
	text := ""
	for _, f := range files {
		sum, err := sumFile(f)
		if err != nil {
			return "", err
		}
		text += sum[:6]
	}
	return text, nil
}

func sumFile(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
