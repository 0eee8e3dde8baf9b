package overlayutil

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/tree"
)

// Features is what overlay mounts of this kernel do.
type Features struct {
	// OpaqueCopiedUp is a bug: a directory that is copied up keeps the opaque
	// mark of the lower one, and hides, from the next mount on, what it showed
	// before. Fixed by 0956254a2d5b, Linux 4.8; kernels of RHEL 7 have it.
	OpaqueCopiedUp bool
	XattrWhiteouts bool // AttrWhiteout is honoured (Linux 6.8 with "x")
	RedirectDir    bool // the option redirect_dir is known (4.10)
	Redirects      bool // without it, renaming a lower directory makes a redirect
	Metacopy       bool // the option metacopy is known (4.19)
	Metacopies     bool // without it, chmod of a lower file makes a metacopy
	Index          bool // index=on is possible (4.13; needs file handles)
	UserXattr      bool // userxattr is known (5.11)
	IDMappedMounts bool // owners of lower directories can be mapped (5.19)
}

// SelfContained returns the options that keep a writable mount from leaving
// redirects and metacopies in its upper directory. A mount with userxattr makes
// none, and refuses the options (fs/overlayfs/params.c).
func (f Features) SelfContained(space Space) []string {
	var options []string
	if space == User {
		return nil
	}
	if f.RedirectDir {
		options = append(options, "redirect_dir=off")
	}
	if f.Metacopy {
		options = append(options, "metacopy=off")
	}
	return options
}

const probePattern = ".overlay-probe-"

var probed sync.Map // file system type and Space to Features

// Probe finds the features by mounting below dir, in mounts of the given space.
// The result is kept for other directories on file systems of the same type. On
// a full disk, where nothing can be tried, it is a cautious guess.
// Another process must not probe in dir at the same time.
func Probe(dir string, space Space) (f Features, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("probe overlay mounts below %s: %w", dir, err)
		}
	}()
	if err := removeProbes(dir); err != nil {
		return f, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return f, os.NewSyscallError("statfs", err)
	}
	key := fmt.Sprint(st.Type, space)
	if known, ok := probed.Load(key); ok {
		return known.(Features), nil
	}
	defer func() { err = errors.Join(err, removeProbes(dir)) }()
	base, err := os.MkdirTemp(dir, probePattern)
	if err == nil {
		f, err = prober{base: base, space: space}.run()
	}
	switch {
	case fsync.IsFull(err):
		return guess(), nil
	case err == nil:
		probed.Store(key, f)
	}
	return f, err
}

// guess is what is known without mounting, on a full disk: an option is supported when
// the module has a parameter for its default. For the rest the worst is assumed.
func guess() Features {
	known := func(option string) bool {
		_, err := os.Lstat("/sys/module/overlay/parameters/" + option)
		return err == nil
	}
	return Features{
		OpaqueCopiedUp: true,
		RedirectDir:    known("redirect_dir"), Metacopy: known("metacopy"), Index: known("index"),
		IDMappedMounts: IDMappedMounts(),
	}
}

// removeProbes removes what a probe left, also one that was killed.
func removeProbes(dir string) error {
	left, err := filepath.Glob(filepath.Join(dir, probePattern+"*"))
	for _, base := range left {
		if e := unix.Unmount(filepath.Join(base, "merged"), unix.MNT_DETACH); e != nil && e != unix.EINVAL && e != unix.ENOENT {
			err = errors.Join(err, &os.PathError{Op: "unmount", Path: base, Err: e})
			continue
		}
		// What cannot be deleted, such as an immutable file, does not disturb the
		// next probe, which has a directory of its own.
		if e := tree.Remove(context.Background(), base); !errors.As(e, new(*tree.LeftError)) {
			err = errors.Join(err, e)
		}
	}
	return err
}

type prober struct {
	base  string
	space Space
}

func (p prober) path(elem ...string) string {
	return filepath.Join(append([]string{p.base}, elem...)...)
}

// run makes two lower layers and inspects them through several mounts.
func (p prober) run() (f Features, err error) {
	for _, d := range []string{"merged", "low/opaque", "low/x", "low/renamed", "mid/opaque", "mid/x"} {
		if err := os.MkdirAll(p.path(d), 0o755); err != nil {
			return f, err
		}
	}
	for _, name := range []string{"low/x/gone", "mid/x/gone", "low/renamed/file", "low/file"} {
		if err := os.WriteFile(p.path(name), nil, 0o600); err != nil {
			return f, err
		}
	}
	if err := errors.Join(
		p.space.Set(p.path("mid/opaque"), AttrOpaque, Opaque),
		p.space.Set(p.path("mid/x"), AttrOpaque, XattrWhiteouts),
		p.space.Set(p.path("mid/x/gone"), AttrWhiteout, ""),
		os.WriteFile(p.path("low/file"), []byte("content"), 0o600),
	); err != nil {
		return f, err
	}
	f.IDMappedMounts = IDMappedMounts()
	f.UserXattr = p.try("userxattr")
	f.Index = p.try(p.usual("index=on")...)
	f.RedirectDir = p.try(p.usual("redirect_dir=off")...)
	f.Metacopy = p.try(p.usual("metacopy=off")...)
	return f, p.mounted(func(merged, upper string) error { return p.inspect(&f, merged, upper) }, p.usual()...)
}

// usual adds the option that the space needs.
func (p prober) usual(options ...string) []string {
	if p.space == User {
		return append(options, "userxattr")
	}
	return options
}

// inspect finds what a mount without further options does.
func (p prober) inspect(f *Features, merged, upper string) error {
	if _, err := os.Lstat(filepath.Join(merged, "x/gone")); errors.Is(err, os.ErrNotExist) {
		f.XattrWhiteouts = true
	} else if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(merged, "opaque/new"), nil, 0o600); err != nil {
		return err
	}
	mark, err := p.space.Get(filepath.Join(upper, "opaque"), AttrOpaque)
	if err != nil {
		return err
	}
	f.OpaqueCopiedUp = mark == Opaque

	err = os.Rename(filepath.Join(merged, "renamed"), filepath.Join(merged, "new"))
	if err == nil {
		f.Redirects = true
	} else if !errors.Is(err, unix.EXDEV) {
		return err
	}
	if err := os.Chmod(filepath.Join(merged, "file"), 0o640); err != nil {
		return err
	}
	_, f.Metacopies, err = p.space.lookup(filepath.Join(upper, "file"), AttrMetacopy)
	return err
}

// try reports whether a mount with the options is possible.
func (p prober) try(options ...string) bool {
	return p.mounted(func(string, string) error { return nil }, options...) == nil
}

// mounted calls fn with a mount of both layers and a fresh upper directory.
func (p prober) mounted(fn func(merged, upper string) error, options ...string) (err error) {
	merged, upper, work := p.path("merged"), p.path("upper"), p.path("work")
	defer func() {
		err = errors.Join(err, tree.Remove(context.Background(), upper), tree.Remove(context.Background(), work))
	}()
	if err := errors.Join(os.Mkdir(upper, 0o755), os.Mkdir(work, 0o755)); err != nil {
		return err
	}
	o := Options{Lower: []string{p.path("mid"), p.path("low")}, Upper: upper, Work: work, Rest: options}
	// Unmounting syncs the upper file system, unless the mount is volatile
	// (5.10): nothing here needs to last.
	data := strings.Join(o.Strings(), ",")
	if err := unix.Mount("overlay", merged, "overlay", 0, data+",volatile"); err != nil {
		if err := unix.Mount("overlay", merged, "overlay", 0, data); err != nil {
			return &os.PathError{Op: "mount overlay " + strings.Join(options, ","), Path: merged, Err: err}
		}
	}
	defer func() { err = errors.Join(err, unix.Unmount(merged, 0)) }()
	return fn(merged, upper)
}
