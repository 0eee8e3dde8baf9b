package kit

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
)

// unpackDebian downloads Debian's containerd package and unpacks it below work. Nothing is
// installed: the machine's own containerd, if any, is untouched.
func unpackDebian(ctx context.Context, _, work string) (string, error) {
	// apt drops its privileges for a download and then warns about a directory
	// the user _apt cannot write to; as root it is content with a warning.
	download := func() error {
		_, err := run(ctx, work, nil, "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", "containerd")
		return err
	}
	if err := download(); err != nil {
		// A fresh machine has no lists of packages, and an old one has lists of
		// packages that are gone.
		if _, uerr := run(ctx, work, nil, "apt-get", "-q", "update"); uerr != nil {
			return "", errors.Join(err, uerr)
		}
		if err := download(); err != nil {
			return "", err
		}
	}
	debs, err := filepath.Glob(filepath.Join(work, "containerd_*.deb"))
	if err != nil || len(debs) != 1 {
		return "", fmt.Errorf("debian containerd: want one package in %s, have %q (%v)", work, debs, err)
	}
	root := filepath.Join(work, "root")
	if _, err := run(ctx, work, nil, "dpkg-deb", "-x", debs[0], root); err != nil {
		return "", err
	}
	return filepath.Join(root, "usr", "bin"), nil
}
