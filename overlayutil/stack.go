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
	for _, layer := range s.Layers {
		path, last, err := s.Space.LookupIn(layer, rel)
		if err != nil || last {
			return path, err
		}
	}
	return "", nil
}

// LookupIn is Lookup in one layer. It returns the path of the entry, or "" when
// the layer shows none. When last is true, lower layers do not matter.
func (s Space) LookupIn(layer, rel string) (path string, last bool, err error) {
	names := strings.Split(filepath.Clean(rel), "/")
	path = layer
	for i, name := range names {
		path = filepath.Join(path, name)
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); errors.Is(err, unix.ENOENT) {
			return "", last, nil
		} else if err != nil {
			return "", false, &os.PathError{Op: "lstat", Path: path, Err: err}
		}
		whiteout, err := s.IsWhiteout(path, &st)
		if err != nil || whiteout {
			return "", true, err
		}
		final := i == len(names)-1
		if final {
			return path, true, nil
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return "", true, nil
		}
		opaque, err := s.Get(path, AttrOpaque)
		if err != nil {
			return "", false, err
		}
		last = last || opaque == Opaque
	}
	return "", last, nil
}

// Top lists the names that the stack shows in its root, sorted.
func (s Stack) Top() ([]string, error) {
	shown := map[string]bool{} // false: hidden by a whiteout
	for _, layer := range s.Layers {
		if err := s.Space.AddTop(layer, shown); err != nil {
			return nil, err
		}
	}
	return Shown(shown), nil
}

// AddTop adds to shown the names in the root of a layer that no layer above it
// has. The value is false for one that a whiteout hides.
func (s Space) AddTop(layer string, shown map[string]bool) error {
	entries, err := os.ReadDir(layer)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if _, decided := shown[e.Name()]; decided {
			continue
		}
		path := filepath.Join(layer, e.Name())
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return &os.PathError{Op: "lstat", Path: path, Err: err}
		}
		whiteout, err := s.IsWhiteout(path, &st)
		if err != nil {
			return err
		}
		shown[e.Name()] = !whiteout
	}
	return nil
}

// Shown lists the names whose value is true, sorted.
func Shown(names map[string]bool) []string {
	var shown []string
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if names[name] {
			shown = append(shown, name)
		}
	}
	return shown
}
