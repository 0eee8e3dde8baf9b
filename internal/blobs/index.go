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
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// index is the content of the manifests of a store. Reading them again costs one
// lstat for each blob: those that did not change are not opened again.
type index struct {
	chains map[digest.Digest][]Blob
	layers map[digest.Digest][]Blob // by diff ID
	// diffIDs are those of all configurations, with repetitions.
	diffIDs []digest.Digest
	over    []string // manifests, or what may be one, that were skipped, and why
	unread  bool     // one of those was skipped because it could not be read

	read  time.Time               // when the refresh that the above comes from began
	dirs  map[string]time.Time    // the directories it listed, and their time then
	files map[digest.Digest]*file // the small blobs that were opened

	others map[digest.Digest]int64 // sizes of the blobs that are no JSON
}

// file is a blob that was opened to see whether it is a manifest.
type file struct {
	id       fileID
	manifest *manifest       // nil when it is none
	diffIDs  []digest.Digest // of a configuration, which may have lost its manifest
	other    bool            // it is no JSON
	problem  string          // why it is not used although it may be one
	unread   bool            // because of an error of reading it, or its configuration
}

// fileID changes whenever a file is replaced or written.
type fileID struct {
	ino        uint64
	size       int64
	mtim, ctim syscall.Timespec
}

func idOf(info fs.FileInfo) fileID {
	st := info.Sys().(*syscall.Stat_t)
	return fileID{st.Ino, st.Size, st.Mtim, st.Ctim}
}

// settled is how old a directory's time must be before it is trusted to change
// with the directory: kernels before 6.13 take it from a clock that ticks every
// few milliseconds, and some file systems know seconds only.
//
// A clock that jumps does not break this. Backward: the time lies in the future, so
// the directory is not trusted and listed each time. Forward: the time is older than
// it seems, but a later change gives it a time after the jump, which differs.
const settled = 2 * time.Second

// current reports whether the directories have not changed.
func (x *index) current() bool {
	for dir, then := range x.dirs {
		info, err := os.Stat(dir)
		if err != nil || !info.ModTime().Equal(then) {
			return false
		}
	}
	return x.dirs != nil
}

// refresh reads what is new below dir. When it is interrupted, what it has read is kept
// for the next time, so that several attempts succeed on a slow disk.
func (x *index) refresh(ctx context.Context, dir string) error {
	began := time.Now()
	files := map[digest.Digest]*file{}
	dirs := map[string]time.Time{}
	if x.files == nil {
		x.files = files
	}
	others := map[digest.Digest]int64{}
	if err := x.walk(ctx, dir, dirs, files, others); err != nil {
		maps.Copy(x.files, files)
		return err
	}
	x.files, x.others = files, others
	x.read = began
	x.dirs = dirs
	x.combine()
	return nil
}

// errNotStore is the reason why a directory is not a content store.
type errNotStore string

func (e errNotStore) Error() string { return string(e) }

// walk fills dirs, files and others from what is below dir.
func (x *index) walk(ctx context.Context, dir string, dirs map[string]time.Time, files map[digest.Digest]*file, others map[digest.Digest]int64) error {
	algorithms, err := list(dir, dirs)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return errNotStore("it has no directory blobs")
	}
	if err != nil {
		return err
	}
	// containerd never deletes a directory of an algorithm. Without any, this is the
	// empty mount point of a store, or was never written to.
	algorithms = slices.DeleteFunc(algorithms, func(a string) bool { return !digest.Algorithm(a).Available() })
	if len(algorithms) == 0 {
		return errNotStore("blobs is empty")
	}
	for _, a := range algorithms {
		algorithm := digest.Algorithm(a)
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
			f, size := x.file(filepath.Join(dir, a, name), d)
			if f != nil {
				files[d] = f
			}
			if size > 0 {
				others[d] = size
			}
		}
	}
	// Configurations come last: a manifest may come before or after its own. Their
	// content is kept even when they are deleted.
	for d, f := range files {
		if f.manifest == nil || f.manifest.diffIDs != nil {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		f.problem, f.unread = "", false
		if err := f.manifest.resolve(dir); err != nil {
			f.problem, f.unread = fmt.Sprintf("manifest %s: %v", d, err), errors.Is(err, ErrCannot)
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

// file returns what is known of a blob, and opens it if nothing is. It returns nil for what
// cannot be a manifest by its size, and for what is gone. size is that of a blob that is no
// JSON, else 0.
func (x *index) file(path string, d digest.Digest) (f *file, size int64) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0
	}
	// One bad sector must not hide the other manifests. Without an id, the blob is
	// tried again.
	if err != nil {
		return &file{problem: fmt.Sprintf("%s: %v", d, err), unread: true}, 0
	}
	if !info.Mode().IsRegular() || info.Size() == 0 {
		return nil, 0
	}
	if info.Size() > largest {
		return nil, info.Size()
	}
	id := idOf(info)
	if f = x.files[d]; f == nil || f.id != id {
		if f = read(path, d, id); f == nil {
			return nil, 0
		}
	}
	if f.other {
		size = info.Size()
	}
	return f, size
}

// read opens a small blob. It returns nil for what is gone.
func read(path string, d digest.Digest, id fileID) *file {
	f := &file{id: id}
	text, err := document(path, d)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, ErrCorrupt):
		f.problem = fmt.Sprintf("%s %v", d, err)
	case err != nil:
		f.id, f.problem, f.unread = fileID{}, fmt.Sprintf("%s: %v", d, err), true
	case text == nil:
		f.other = true
	default:
		if f.manifest = parseManifest(text); f.manifest == nil {
			f.diffIDs, _, _ = Config(text) // of a bad one its manifest reports it
		}
	}
	return f
}

// combine makes the index out of the manifests.
func (x *index) combine() {
	x.chains, x.layers, x.diffIDs = map[digest.Digest][]Blob{}, map[digest.Digest][]Blob{}, nil
	x.over, x.unread = nil, false
	for _, d := range slices.Sorted(maps.Keys(x.files)) {
		f := x.files[d]
		if f.problem != "" {
			x.over = append(x.over, f.problem)
			x.unread = x.unread || f.unread
			continue
		}
		x.diffIDs = append(x.diffIDs, f.diffIDs...)
		if f.manifest == nil {
			continue
		}
		x.diffIDs = append(x.diffIDs, f.manifest.diffIDs...)
		for i, chain := range f.manifest.chains {
			b := Blob{Descriptor: f.manifest.layers[i], DiffID: f.manifest.diffIDs[i]}
			x.chains[chain] = append(x.chains[chain], b)
			x.layers[b.DiffID] = append(x.layers[b.DiffID], b)
		}
	}
}

// find returns the blobs that manifests name for the chain ID of a layer, and for its diff
// ID on other layers. Different images have the same layer at different places: on another
// base, or twice.
func (x *index) find(want Layer) (own, others []Blob) {
	own = x.chains[digest.Digest(want.ChainID)]
	for _, b := range x.layers[x.diffID(want)] {
		if !slices.ContainsFunc(own, func(o Blob) bool { return o.Digest == b.Digest }) {
			others = append(others, b)
		}
	}
	return own, others
}

// diffID returns the diff ID of a layer, "" when nothing in the store, nor the caller,
// has it.
func (x *index) diffID(want Layer) digest.Digest {
	if own := x.chains[digest.Digest(want.ChainID)]; len(own) > 0 {
		return own[0].DiffID
	}
	if id := digest.Digest(want.DiffID); id.Validate() == nil && want.Is(id) {
		return id
	}
	for _, id := range x.diffIDs {
		if want.Is(id) {
			return id
		}
	}
	return ""
}

// unnamed returns the blobs that may be layers and that no manifest in use names, as blobs
// of a layer: the manifest of one of them may be lost.
func (x *index) unnamed(want Layer) (all []Blob) {
	id := x.diffID(want)
	if id == "" {
		return nil
	}
	named := map[digest.Digest]bool{}
	for _, blobs := range x.layers {
		for _, b := range blobs {
			named[b.Digest] = true
		}
	}
	for _, d := range slices.Sorted(maps.Keys(x.others)) {
		if size := x.others[d]; !named[d] && want.plausible(size) {
			all = append(all, Blob{Descriptor: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: d, Size: size}, DiffID: id})
		}
	}
	return all
}
