package kit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// WithContainerd returns b with containerd and ctr of another release, such as
// "1.7.35". The first call for a release downloads its sources through the Go
// module proxy, which Go verifies against the checksum database, and takes
// minutes; what it built stays beside the binaries of [Build] until make clean.
func (b Binaries) WithContainerd(ctx context.Context, release string) (Binaries, error) {
	_, bin, unlock, err := binDir(ctx)
	if err != nil {
		return Binaries{}, err
	}
	defer unlock()
	dir := filepath.Join(bin, "containerd-"+release)
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		if err := buildRelease(ctx, release, dir); err != nil {
			return Binaries{}, fmt.Errorf("build containerd %s from the Go module proxy: %w", release, err)
		}
	}
	b.Containerd, b.Ctr = filepath.Join(dir, "containerd"), filepath.Join(dir, "ctr")
	return b, nil
}

// buildRelease fills dir, which appears only once it is complete.
func buildRelease(ctx context.Context, release, dir string) (err error) {
	module := "github.com/containerd/containerd"
	if !strings.HasPrefix(release, "1.") {
		module += "/v2"
	}
	programs := []string{module + "/cmd/containerd", module + "/cmd/ctr"}
	work, err := os.MkdirTemp(filepath.Dir(dir), ".build-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()

	// A module of its own that requires the release: go install refuses the 1.7
	// releases, whose go.mod has exclude directives.
	get := []string{"go", "get"}
	for _, p := range programs {
		get = append(get, p+"@v"+release)
	}
	for _, argv := range [][]string{{"go", "mod", "init", "example.com/containerd"}, get} {
		if _, err := run(ctx, work, []string{"GOWORK=off"}, argv...); err != nil {
			return err
		}
	}
	// The tags leave out the snapshotters that need cgo or a program of their own.
	out := filepath.Join(work, "bin")
	if err := os.Mkdir(out, 0o755); err != nil {
		return err
	}
	if err := goBuild(ctx, work, out+"/", append([]string{"-tags", "no_aufs,no_btrfs,no_devmapper,no_zfs"}, programs...)...); err != nil {
		return err
	}
	return os.Rename(out, dir)
}
