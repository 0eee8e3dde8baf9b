package overlayutil

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Stack is what a mount merges: the directories of layers, topmost first.
type Stack struct {
	Space  Space
	Layers []string
}

// Lookup finds what the stack shows at a path relative to its root, as the
// kernel would (fs/overlayfs/namei.c, ovl_lookup): the entry of the topmost
// layer that has the path, unless a layer above hides it with a whiteout, with
// something that is not a directory, or with an opaque directory on the way.
// It returns the path of that entry in its layer, or "" when nothing is shown.
// The directories of a layer's path must be real ones, not redirected.
func (s Stack) Lookup(rel string) (string, error) {
	names := strings.Split(filepath.Clean(rel), "/")
	for _, layer := range s.Layers {
		path, found, last, err := s.lookIn(layer, names)
		if err != nil {
			return "", err
		}
		if found {
			return path, nil
		}
		if last {
			return "", nil
		}
	}
	return "", nil
}

// lookIn looks into one layer. last means that lower layers are hidden.
func (s Stack) lookIn(layer string, names []string) (path string, found, last bool, err error) {
	path = layer
	for i, name := range names {
		path = filepath.Join(path, name)
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); errors.Is(err, unix.ENOENT) {
			return "", false, last, nil
		} else if err != nil {
			return "", false, false, &os.PathError{Op: "lstat", Path: path, Err: err}
		}
		whiteout, err := s.Space.IsWhiteout(path, &st)
		if err != nil || whiteout {
			return "", false, true, err
		}
		final := i == len(names)-1
		if final {
			return path, true, true, nil
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return "", false, true, nil
		}
		opaque, err := s.Space.Get(path, AttrOpaque)
		if err != nil {
			return "", false, false, err
		}
		last = last || opaque == Opaque
	}
	return "", false, last, nil
}

// Top lists the names that the stack shows in its root, sorted.
func (s Stack) Top() ([]string, error) {
	shown := map[string]bool{} // false: hidden by a whiteout
	for _, layer := range s.Layers {
		entries, err := os.ReadDir(layer)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if _, decided := shown[e.Name()]; decided {
				continue
			}
			path := filepath.Join(layer, e.Name())
			var st unix.Stat_t
			if err := unix.Lstat(path, &st); err != nil {
				return nil, &os.PathError{Op: "lstat", Path: path, Err: err}
			}
			whiteout, err := s.Space.IsWhiteout(path, &st)
			if err != nil {
				return nil, err
			}
			shown[e.Name()] = !whiteout
		}
	}
	maps.DeleteFunc(shown, func(_ string, visible bool) bool { return !visible })
	return slices.Sorted(maps.Keys(shown)), nil
}
