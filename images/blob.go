package images

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
)

// Blob is a blob that containerd has on record and that is not what its digest
// says.
type Blob struct {
	Digest digest.Digest
	Size   int64  // on record
	Flaw   string // missing, short, grown, corrupt or unreadable
}

const (
	missing    = "missing"
	short      = "short"
	grown      = "grown"
	corrupt    = "corrupt"
	unreadable = "unreadable"
)

// ofTheDisk are the errors of reading that say something of the disk under a
// file. Over gRPC only their text arrives.
var ofTheDisk = []error{unix.EIO, unix.EUCLEAN, unix.EBADMSG}

func flawOf(err error) string {
	switch {
	case errdefs.IsNotFound(err):
		return missing
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

// read reads a small blob and tells what is wrong with it.
func (c *Containerd) read(ctx context.Context, info content.Info, limit int64) ([]byte, string, error) {
	if info.Size > limit {
		return nil, corrupt, nil
	}
	body := make([]byte, 0, info.Size)
	flaw, err := c.examine(ctx, info, func(part []byte) { body = append(body, part...) })
	return body, flaw, err
}

// examine reads a blob through containerd, compares it with its digest, and tells
// what is wrong with it. containerd itself only looks whether there is a file.
func (c *Containerd) examine(ctx context.Context, info content.Info, each func([]byte)) (flaw string, err error) {
	if err := info.Digest.Validate(); err != nil {
		return "", fmt.Errorf("read blob %s: %w", info.Digest, err)
	}
	r, err := c.content.ReaderAt(ctx, ocispec.Descriptor{Digest: info.Digest, Size: info.Size})
	if err != nil {
		return unless(flawOf(err), info.Digest, err)
	}
	defer r.Close()
	verifier := info.Digest.Verifier()
	part := make([]byte, 1<<20)
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

// flaw is examine for blobs of any size. With the root of the content store it
// finds those that have grown, too.
func (c *Containerd) flaw(ctx context.Context, info content.Info, root string) (string, error) {
	flaw, err := c.examine(ctx, info, nil)
	if flaw != "" || err != nil {
		return flaw, err
	}
	if long, err := grownOnDisk(root, info); err != nil || !long {
		return "", err
	}
	return grown, nil
}

// unless returns the error only when it says nothing of the blob.
func unless(flaw string, d digest.Digest, err error) (string, error) {
	if flaw == "" {
		return "", fmt.Errorf("read blob %s: %w", d, err)
	}
	return flaw, nil
}

// grownOnDisk tells whether a blob's file below the root of a content store is
// longer than it should be. containerd's API reads only as far as the recorded
// length, but its unpacker reads to the end and stumbles.
func grownOnDisk(root string, info content.Info) (bool, error) {
	if root == "" {
		return false, nil
	}
	st, err := os.Stat(filepath.Join(root, "blobs", info.Digest.Algorithm().String(), info.Digest.Encoded()))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look at blob %s: %w", info.Digest, err)
	}
	return st.Size() > info.Size, nil
}
