package extract

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"runtime"
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/idle"
)

// Whiteouts is what the whiteouts of a tar become.
type Whiteouts int

const (
	// Mark makes marks of overlayfs, as archive.OverlayConvertWhiteout does. It is for
	// the upper directory of an overlay mount.
	Mark Whiteouts = iota
	// Remove removes what they name from the directory. It is for a directory that is
	// no upper one, and for a mount.
	Remove
)

// Options of Apply.
type Options struct {
	// Dir is the directory that gets the tree. It may have entries already; no other
	// process changes it meanwhile.
	Dir string
	// Tar is the stream, decompressed. It is read to its end. A Read must end when the
	// caller's context does.
	Tar io.Reader
	// Whiteouts is what the whiteouts of the tar become.
	Whiteouts Whiteouts
	// Digests takes digests of the content of regular files on the way.
	Digests bool
	// Files gets the regular files that were written, in place of closing them. May be nil.
	Files *fsync.Files
	// Directory is called for each directory that has an entry in the tar, with its path
	// in Dir, in the order of the tar. May be nil.
	Directory func(rel string)
}

// Result is what Apply knows of a layer.
type Result struct {
	DiffID digest.Digest // SHA-256 of the whole stream
	Size   int64         // of the whole stream, in bytes

	Entries   int64 // of the tar
	Whiteouts int64 // marks that stand for a removed name, when they are marks
	Opaque    int64 // entries that make a directory opaque

	// Sums are digests of the content of regular files by their inode numbers, nil
	// without Options.Digests. Files that a later entry has removed may be among them,
	// under numbers that no file has.
	Sums map[uint64]Sum
}

// Sum is the content of a regular file.
type Sum struct {
	Size   int64
	SHA256 [32]byte
}

const (
	blockSize    = 256 << 10
	streamBlocks = 16 // between the reader and the parser
	fileBlocks   = 32 // between the parser and those who write files

	// Memory is how many bytes of content the stages of one layer hold at most.
	Memory = (streamBlocks + fileBlocks) * blockSize
	// Layers is how many layers are extracted at a time. Further ones wait.
	Layers = 8
	// Descriptors is how many files one layer has open at most, beside Options.Files.
	Descriptors = openDirs + fileBlocks*batchFiles + 8
)

var (
	// layers has a token for each layer that is being extracted.
	layers = make(chan struct{}, Layers)
	// writers has a token for each goroutine that writes, of all layers: more of them than
	// processors only take the processors from each other.
	writers = make(chan struct{}, max(2, runtime.GOMAXPROCS(0)))
)

// Apply extracts a tar into a directory. After an error the directory holds a part of
// the tree, and all goroutines have ended. An error of Options.Tar is wrapped by the one that is
// returned. Nothing is synced.
func Apply(ctx context.Context, o Options) (Result, error) {
	select {
	case layers <- struct{}{}:
		defer func() { <-layers }()
	case <-ctx.Done():
		return Result{}, ctx.Err()
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)

	root, err := openTree(filepath.Clean(o.Dir))
	if err != nil {
		return Result{}, err
	}
	defer root.close()

	var (
		s     = newStream(o.Tar)
		x     = &extraction{Options: o, ctx: ctx, tree: root, files: newFiles(ctx, cancel, o)}
		stage sync.WaitGroup
	)
	if o.Whiteouts == Remove {
		x.unpacked = newPaths()
	}
	stage.Go(func() { s.read(ctx) })
	err = idle.Contain(func() error { return x.run(s) })
	if err == nil {
		// The tar ends before its stream does.
		_, err = io.Copy(io.Discard, s)
	}
	if err != nil {
		cancel(err)
	}
	s.abandon()
	stage.Wait()
	if cause := context.Cause(ctx); cause != nil {
		// What went wrong first, in whichever stage.
		return Result{}, cause
	}
	x.result.DiffID, x.result.Size, x.result.Sums = digest.NewDigest(digest.SHA256, s.sum), s.size, x.files.sums
	return x.result, nil
}

func failed(op, name string, err error) error { return fmt.Errorf("%s %q: %w", op, name, err) }
