package kit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// DebianContainerd downloads Debian's containerd package and unpacks it under
// dir. Nothing is installed: the machine's own containerd, if any, is untouched.
// Its configuration is of version 2.
func DebianContainerd(ctx context.Context, dir string) (Binaries, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return Binaries{}, fmt.Errorf("debian containerd: %w", err)
	}
	// apt drops its privileges for a download and then warns about a directory
	// the user _apt cannot write to; as root it is content with a warning.
	download := func() error {
		_, err := run(ctx, dir, nil, "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", "containerd")
		return err
	}
	if err := download(); err != nil {
		// A fresh machine has no lists of packages, and an old one has lists of
		// packages that are gone.
		if _, uerr := run(ctx, dir, nil, "apt-get", "-q", "update"); uerr != nil {
			return Binaries{}, errors.Join(err, uerr)
		}
		if err := download(); err != nil {
			return Binaries{}, err
		}
	}
	debs, err := filepath.Glob(filepath.Join(dir, "containerd_*.deb"))
	if err != nil || len(debs) != 1 {
		return Binaries{}, fmt.Errorf("debian containerd: want one package in %s, have %q (%v)", dir, debs, err)
	}
	root := filepath.Join(dir, "root")
	if _, err := run(ctx, dir, nil, "dpkg-deb", "-x", debs[0], root); err != nil {
		return Binaries{}, err
	}
	bin := filepath.Join(root, "usr", "bin")
	return Binaries{Dir: bin, Containerd: filepath.Join(bin, "containerd"), Ctr: filepath.Join(bin, "ctr")}, nil
}
