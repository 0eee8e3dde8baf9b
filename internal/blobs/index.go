package blobs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
)

// index is what the manifests of a store say. Reading them again costs one
// lstat for each blob: those that did not change are not opened again.
type index struct {
	chains map[digest.Digest][]Blob
	over   []string // manifests, or what may be one, that were passed over, and why

	read  time.Time               // when the look that the above comes from began
	dirs  map[string]time.Time    // the directories it listed, and their time then
	files map[digest.Digest]*file // the small blobs that were opened
}

// file is a blob that was opened to see whether it is a manifest.
type file struct {
	id       fileID
	manifest *manifest // nil when it is none
	problem  string    // why it is not used although it may be one
}

// fileID changes whenever a file is replaced or written.
type fileID struct {
	ino        uint64
	size       int64
	mtim, ctim syscall.Timespec
}

// settled is how old a directory's time must be before it is trusted to change
// with the directory: kernels before 6.13 take it from a clock that ticks every
// few milliseconds, and some file systems know seconds only.
const settled = 2 * time.Second

// current tells whether the directories are as they were.
func (x *index) current() bool {
	for dir, then := range x.dirs {
		info, err := os.Stat(dir)
		if err != nil || !info.ModTime().Equal(then) {
			return false
		}
	}
	return x.dirs != nil
}

// refresh reads what is new below dir. When it is cut short, what it learnt is
// kept for the next time, so that a cold disk is overcome in several attempts.
func (x *index) refresh(ctx context.Context, dir string) error {
	began := time.Now()
	files := map[digest.Digest]*file{}
	dirs := map[string]time.Time{}
	if x.files == nil {
		x.files = files
	}
	if err := x.walk(ctx, dir, dirs, files); err != nil {
		maps.Copy(x.files, files)
		return err
	}
	x.files = files
	x.read = began
	x.dirs = dirs
	x.combine()
	return nil
}

// walk fills dirs and files from what is below dir.
func (x *index) walk(ctx context.Context, dir string, dirs map[string]time.Time, files map[digest.Digest]*file) error {
	algorithms, err := list(dir, dirs)
	if errors.Is(err, fs.ErrNotExist) {
		return notFound("there is no content store in %s", filepath.Dir(dir))
	}
	if err != nil {
		return err
	}
	for _, a := range algorithms {
		algorithm := digest.Algorithm(a)
		if !algorithm.Available() {
			continue
		}
		names, err := list(filepath.Join(dir, a), dirs)
		if err != nil {
			return err
		}
		for _, name := range names {
			d := digest.NewDigestFromEncoded(algorithm, name)
			if x.files[d] == nil && d.Validate() != nil {
				continue
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			if f := x.look(filepath.Join(dir, a, name), d); f != nil {
				files[d] = f
			}
		}
	}
	// Configurations come last: a manifest may lie before or after its own. What
	// they say is kept, whatever becomes of them.
	for d, f := range files {
		if f.manifest == nil || f.manifest.diffIDs != nil {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		f.problem = ""
		if err := f.manifest.resolve(dir); err != nil {
			f.problem = fmt.Sprintf("manifest %s: %v", d, err)
		}
	}
	return nil
}

// list returns the names in a directory, sorted, and notes its time.
func list(dir string, dirs map[string]time.Time) ([]string, error) {
	info, err := os.Stat(dir)
	if err != nil {
		return nil, err
	}
	if dirs[dir] = info.ModTime(); time.Since(info.ModTime()) < settled {
		dirs[dir] = time.Time{}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, nil
}

// look returns what is known of a blob, and opens it if nothing is. It returns
// nil for what cannot be a manifest by its size, and for what is gone.
func (x *index) look(path string, d digest.Digest) *file {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	// One bad sector must not hide the other manifests. Without an id, the blob is
	// tried again.
	if err != nil {
		return &file{problem: fmt.Sprintf("%s: %v", d, err)}
	}
	if !info.Mode().IsRegular() || info.Size() == 0 || info.Size() > largest {
		return nil
	}
	st := info.Sys().(*syscall.Stat_t)
	id := fileID{st.Ino, st.Size, st.Mtim, st.Ctim}
	if f := x.files[d]; f != nil && f.id == id {
		return f
	}
	f := &file{id: id}
	text, err := document(path, d)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, ErrCorrupt):
		f.problem = fmt.Sprintf("%s %v", d, err)
	case err != nil:
		f.id, f.problem = fileID{}, fmt.Sprintf("%s: %v", d, err)
	default:
		f.manifest = parseManifest(text)
	}
	return f
}

// combine makes the index out of the manifests.
func (x *index) combine() {
	x.chains, x.over = map[digest.Digest][]Blob{}, nil
	for _, d := range slices.Sorted(maps.Keys(x.files)) {
		f := x.files[d]
		if f.problem != "" {
			x.over = append(x.over, f.problem)
			continue
		}
		if f.manifest == nil {
			continue
		}
		for i, chain := range f.manifest.chains {
			x.chains[chain] = append(x.chains[chain], Blob{f.manifest.layers[i], f.manifest.diffIDs[i]})
		}
	}
}
