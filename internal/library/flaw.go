package library

import (
	"context"
	_ "crypto/sha512" // for digests of that kind
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/inflate"
)

// What may be wrong with a blob.
const (
	// Missing: containerd has a record of the blob and no file, or no record.
	Missing    = "missing"
	short      = "short"
	grown      = "grown"
	corrupt    = "corrupt"
	unreadable = "unreadable"
)

// ofTheDisk are the errors of reading that are evidence about the disk under a
// file. Over gRPC only their text arrives.
var ofTheDisk = []error{unix.EIO, unix.EUCLEAN, unix.EBADMSG}

func flawOf(err error) string {
	switch {
	case errdefs.IsNotFound(err):
		return Missing
	case err == nil, errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errdefs.IsOutOfRange(err):
		return short
	}
	for _, e := range ofTheDisk {
		if strings.Contains(err.Error(), e.Error()) {
			return unreadable
		}
	}
	return ""
}

// maxConfig bounds what is read into memory.
const maxConfig = 8 << 20

// read reads a small blob and reports what is wrong with it.
func (s Store) read(ctx context.Context, info content.Info, limit int64) (body []byte, flaw string, err error) {
	if info.Size > limit {
		return nil, corrupt, nil
	}
	flaw, err = twice(func() (string, error) {
		body = make([]byte, 0, info.Size)
		return s.examine(ctx, info, func(part []byte) { body = append(body, part...) })
	})
	return body, flaw, err
}

// twice reads a blob again that the disk could not read: a cable or a path of iSCSI may
// work again by then.
func twice(read func() (flaw string, err error)) (string, error) {
	flaw, err := read()
	if err == nil && flaw == unreadable {
		flaw, err = read()
	}
	return flaw, err
}

// examine reads a blob through containerd, compares it with its digest, and returns
// what is wrong with it. containerd itself only checks whether there is a file.
func (s Store) examine(ctx context.Context, info content.Info, each func([]byte)) (flaw string, err error) {
	if err := info.Digest.Validate(); err != nil {
		return "", fmt.Errorf("read blob %s: %w", info.Digest, err)
	}
	r, err := s.content.ReaderAt(ctx, ocispec.Descriptor{Digest: info.Digest, Size: info.Size})
	if err != nil {
		return unless(flawOf(err), info.Digest, err)
	}
	defer r.Close()
	verifier := info.Digest.Verifier()
	part := make([]byte, max(0, min(info.Size, 1<<20))) // no size on record makes it panic
	for at := int64(0); at < info.Size; {
		n, err := r.ReadAt(part[:min(int64(len(part)), info.Size-at)], at)
		if n > 0 {
			if _, err := verifier.Write(part[:n]); err != nil {
				return "", fmt.Errorf("read blob %s: %w", info.Digest, err)
			}
			if each != nil {
				each(part[:n])
			}
			at += int64(n)
			continue
		}
		return unless(flawOf(err), info.Digest, err)
	}
	if !verifier.Verified() {
		return corrupt, nil
	}
	return "", nil
}

// Flaw reads a blob of any size, and returns what is wrong with it: missing, short, grown,
// corrupt or unreadable, "" when nothing is. With the root of the content store it finds
// those that have grown, too. The error proves nothing about the blob.
func (s Store) Flaw(ctx context.Context, info content.Info, root string) (string, error) {
	flaw, err := twice(func() (string, error) { return s.examine(ctx, info, nil) })
	if flaw != "" || err != nil {
		return flaw, err
	}
	if long, err := grownOnDisk(root, info); err != nil || !long {
		return "", err
	}
	return grown, nil
}

// Document reads a small blob, such as a manifest, an index or a config, and returns what is
// wrong with it as Flaw does. The body is good when both are zero.
func (s Store) Document(ctx context.Context, info content.Info, root string) (body []byte, flaw string, err error) {
	if body, flaw, err = s.read(ctx, info, maxConfig); flaw != "" || err != nil {
		return nil, flaw, err
	}
	if long, err := grownOnDisk(root, info); err != nil || long {
		return nil, grown, err
	}
	return body, "", nil
}

// Sized returns what is wrong with a blob as far as the length of its file shows it: missing,
// short or grown, "" when nothing is. root is that of the content store, "" when its files
// cannot be seen from here: then containerd reads the last byte, and what has grown is not
// noticed. Of a file that seems to be missing or short containerd reads the last byte, too,
// and its own view decides. The error proves nothing about the blob.
func (s Store) Sized(ctx context.Context, info content.Info, root string) (flaw string, err error) {
	if root != "" {
		st, err := os.Stat(fileOf(root, info.Digest))
		switch {
		case err == nil && st.Size() == info.Size:
			return "", nil
		case err == nil && st.Size() > info.Size:
			return grown, nil
		case err != nil && !errors.Is(err, os.ErrNotExist):
			return "", fmt.Errorf("stat blob %s: %w", info.Digest, err)
		}
	}
	if err := info.Digest.Validate(); err != nil {
		return "", fmt.Errorf("read blob %s: %w", info.Digest, err)
	}
	return twice(func() (string, error) { return s.last(ctx, info) })
}

// last reads the last byte of a blob through containerd.
func (s Store) last(ctx context.Context, info content.Info) (flaw string, err error) {
	r, err := s.content.ReaderAt(ctx, ocispec.Descriptor{Digest: info.Digest, Size: info.Size})
	if err != nil {
		return unless(flawOf(err), info.Digest, err)
	}
	defer r.Close()
	if n, err := r.ReadAt(make([]byte, 1), max(0, info.Size-1)); n == 0 && info.Size > 0 {
		return unless(flawOf(err), info.Digest, err)
	}
	return "", nil
}

// fileOf is the file of a blob below the root of a content store.
func fileOf(root string, d digest.Digest) string {
	return filepath.Join(root, "blobs", d.Algorithm().String(), d.Encoded())
}

// unless returns the error only when it proves nothing about the blob.
func unless(flaw string, d digest.Digest, err error) (string, error) {
	if flaw == "" {
		return "", fmt.Errorf("read blob %s: %w", d, err)
	}
	return flaw, nil
}

// grownOnDisk reports whether a blob's file below the root of a content store is
// longer than it should be. containerd's API reads only as far as the recorded
// length, but its unpacker reads to the end and fails.
func grownOnDisk(root string, info content.Info) (bool, error) {
	if root == "" {
		return false, nil
	}
	st, err := os.Stat(fileOf(root, info.Digest))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("stat blob %s: %w", info.Digest, err)
	}
	return st.Size() > info.Size, nil
}

// DiffID decompresses a blob and returns the digest of what it holds.
func (s Store) DiffID(ctx context.Context, info content.Info) (digest.Digest, error) {
	r, err := s.content.ReaderAt(ctx, ocispec.Descriptor{Digest: info.Digest, Size: info.Size})
	if err != nil {
		return "", err
	}
	defer r.Close()
	tar, err := inflate.Stream(content.NewReader(r))
	if err != nil {
		return "", err
	}
	defer tar.Close()
	// Real layers do not compress further than this. Zeros do, and would take for ever.
	most := 1<<30 + 100*info.Size
	digester := digest.Canonical.Digester()
	n, err := io.Copy(digester.Hash(), io.LimitReader(tar, most))
	if err == nil && n == most {
		err = fmt.Errorf("blob %s holds more than %d bytes", info.Digest, most)
	}
	return digester.Digest(), err
}
