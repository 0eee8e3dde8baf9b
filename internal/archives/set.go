package archives

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/opencontainers/go-digest"

	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
)

var _ blobs.Source = (*Set)(nil)

// Set is the archives of a node. It may be used from several goroutines.
type Set struct {
	paths []string
	// busy holds a token while a caller uses known. It is a channel so that a caller
	// who waits for it can give up.
	busy  chan struct{}
	known map[string]*archive // by path
}

// Open returns the archives at paths: files, and directories, of which the files count and
// not their directories. Nothing is read yet, and nothing need exist.
func Open(paths []string) *Set {
	return &Set{paths: slices.Clone(paths), busy: make(chan struct{}, 1), known: map[string]*archive{}}
}

// fileID changes whenever a file is replaced or written.
type fileID struct {
	dev, ino   uint64
	size       int64
	mtim, ctim syscall.Timespec
}

func idOf(info fs.FileInfo) fileID {
	st := info.Sys().(*syscall.Stat_t)
	return fileID{st.Dev, st.Ino, st.Size, st.Mtim, st.Ctim}
}

// archive is what is known of one file, as long as it has the same id. Nothing but proven
// changes after it was read.
type archive struct {
	path   string
	id     fileID
	layers map[digest.Digest][]member      // by diff ID
	chains map[digest.Digest]digest.Digest // diff IDs by chain ID
	flaw   error                           // why it, or a part of it, is not used; it has a kind
	mu     sync.Mutex                      // guards proven
	proven map[proof]error                 // nil: it holds the layer
	packed func(*tracked) (reader, error)  // nil when it is not compressed
}

// member is a blob in an archive.
type member struct {
	name   string
	number int   // of its entry in the tar
	offset int64 // of its content in an archive that is not compressed
	size   int64
	digest digest.Digest // "" when nothing names it
	media  string
}

type proof struct {
	number int
	diffID digest.Digest
}

// Find returns the blobs of a layer in all archives: those whose documents name them.
// When there is none, the error wraps one of the kinds of package blobs.
func (s *Set) Find(ctx context.Context, want blobs.Layer) ([]blobs.Blob, error) {
	found, reasons, err := s.candidates(ctx, want)
	if err == nil && len(found) == 0 {
		err = blobs.TryEach(ctx, want, nil, reasons, false, nil)
	}
	return found, err
}

// Try calls use with one blob of a layer after the other, until a call returns nil, as
// [blobs.Store.Try] does. A blob is read and decompressed before.
func (s *Set) Try(ctx context.Context, want blobs.Layer, use func(blobs.Blob) error) error {
	found, reasons, err := s.candidates(ctx, want)
	if err != nil {
		return err
	}
	return blobs.TryEach(ctx, want, found, reasons, true, use)
}

// candidates are the blobs of a layer, and the reasons why archives are not used. There is
// at least one of either.
func (s *Set) candidates(ctx context.Context, want blobs.Layer) (found []blobs.Blob, reasons []error, err error) {
	select {
	case s.busy <- struct{}{}:
		defer func() { <-s.busy }()
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
	all, reasons, err := s.read(ctx)
	if err != nil {
		return nil, nil, err
	}
	for _, a := range all {
		has := false
		for id, members := range a.layers {
			if a.chains[digest.Digest(want.ChainID)] != id && !want.Is(id) {
				continue
			}
			for _, m := range members {
				place := fmt.Sprintf("%s in %s", m.name, a.path)
				found = append(found, blobs.NewBlob(origin{a, m}, place, m.descriptor(), id, want))
				has = true
			}
		}
		if !has && a.flaw != nil {
			reasons = append(reasons, a.flaw)
		}
	}
	if len(found)+len(reasons) == 0 {
		reasons = []error{blobs.Problem(blobs.ErrNotFound, nil, "it is in no archive in %s", strings.Join(s.paths, ", "))}
	}
	return found, reasons, nil
}

// read returns the archives, in order, and reads those that are new or have changed. The
// error is that of ctx; what cannot be listed or opened is a reason.
func (s *Set) read(ctx context.Context) (all []*archive, reasons []error, err error) {
	known := map[string]*archive{}
	for _, path := range s.paths {
		files, err := list(path)
		if err != nil {
			reasons = append(reasons, blobs.Problem(blobs.ErrCannot, err, "list image archives"))
		}
		for _, file := range files {
			info, err := os.Stat(file)
			if errors.Is(err, fs.ErrNotExist) || err == nil && !info.Mode().IsRegular() {
				continue
			}
			if err != nil {
				reasons = append(reasons, blobs.Problem(blobs.ErrCannot, err, "list image archives"))
				continue
			}
			a := s.known[file]
			if a == nil || a.id != idOf(info) {
				if a, err = scan(ctx, file); ctx.Err() != nil {
					return nil, nil, ctx.Err()
				}
				if err != nil {
					reasons = append(reasons, err)
					continue
				}
				s.known[file] = a // kept when a later one is interrupted
			}
			known[file] = a
			all = append(all, a)
		}
	}
	s.known = known
	return all, reasons, nil
}

// list returns the files at a path, sorted; none when there is nothing.
func list(path string) ([]string, error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return []string{path}, nil
	}
	entries, err := os.ReadDir(path)
	var files []string
	for _, e := range entries {
		files = append(files, filepath.Join(path, e.Name()))
	}
	return files, err
}
