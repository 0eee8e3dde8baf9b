package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	digest "github.com/opencontainers/go-digest"

	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// CheckResult is what a look at one committed snapshot found.
type CheckResult struct {
	ID       uint64         `json:"id"`
	Name     string         `json:"name"`
	ChainID  string         `json:"chain_id,omitempty"`
	State    string         `json:"state"`
	Entries  int64          `json:"entries"`
	Bytes    int64          `json:"bytes"`
	Sealed   time.Time      `json:"sealed"`
	Checked  time.Time      `json:"checked,omitzero"`   // when the daemon has looked; of a look by itself, now
	Deep     time.Time      `json:"deep,omitzero"`      // when its content was last found whole
	Contents string         `json:"contents,omitempty"` // digest of its content digests, when there are any
	Findings []seal.Finding `json:"findings"`           // the first of them
	Reason   string         `json:"reason,omitempty"`   // of unverified, or why it was not healed
}

// maxFindings bounds the findings of one snapshot: a layer that is gone has as
// many as it had entries.
const maxFindings = 100

func newResult(e storage.CommitEntry) CheckResult {
	return CheckResult{
		ID: e.ID, Name: e.Name, ChainID: e.ChainID,
		Entries: e.Entries, Bytes: e.Bytes, Sealed: e.Time, Findings: []seal.Finding{},
	}
}

// CheckOptions say how Check looks.
type CheckOptions struct {
	// Deep: content is read, and compared with the content digests beside the
	// seal or, without them, with a blob of the layer.
	Deep     bool
	Contents string       // the digest of the content digests, when there are any
	Blobs    *blobs.Store // where there may be a blob
	Reading  seal.Reading
}

// FromDisk reads what the disk has by now, and not the memory of a file in use.
var FromDisk = seal.Reading{Direct: true}

// Check compares the layer of a journal entry with its seal: every name, and of
// each the type, mode, owner, size, times, links and extended attributes. It
// reads content with CheckOptions.Deep only. It writes nothing, and needs no
// daemon. A layer whose seal is lost is damaged: nobody can say that it is whole.
//
// An error means that nothing is known; it is not about the layer.
func Check(ctx context.Context, root string, e storage.CommitEntry, o CheckOptions) (CheckResult, error) {
	r := newResult(e)
	r.State, r.Checked = storage.StateReady, time.Now().UTC()
	if e.Digest == "" {
		r.State, r.Reason = storage.StateUnverified, neverSealed(e)
		return r, nil
	}
	dir := snapshotDir(root, e.ID)
	tree := filepath.Join(dir, "fs")
	verify := seal.Verify
	if o.Reading.Idle {
		verify = seal.VerifyIdle
	}
	found, err := verify(ctx, tree, filepath.Join(dir, sealFile), e.Digest, maxFindings)
	switch {
	case ctx.Err() != nil:
		return r, ctx.Err()
	case errors.Is(err, seal.ErrUnsealed):
		r.State, r.Reason = storage.StateDamaged, err.Error()
		if f, damaged := rootFinding(tree); damaged {
			r.Findings, r.Reason = append(r.Findings, f), ""
		}
	case err != nil:
		f, damage := unreadable(tree, err)
		if !damage {
			return r, fmt.Errorf("look at %q in %s: %w", e.Name, dir, err)
		}
		r.State, r.Findings = storage.StateDamaged, append(r.Findings, f)
	case len(found) > 0:
		r.State, r.Findings = storage.StateDamaged, found
	case o.Deep:
		err = r.compareContent(ctx, dir, e, o)
		return r, err
	}
	return r, nil
}

// compareContent is the deep part of Check, for a layer that is whole otherwise.
// A layer whose content can be compared with nothing is unverified.
func (r *CheckResult) compareContent(ctx context.Context, dir string, e storage.CommitEntry, o CheckOptions) (err error) {
	tree := filepath.Join(dir, "fs")
	var found []seal.Finding
	if o.Contents == "" {
		err = fmt.Errorf("%w: none were taken", seal.ErrUnsealed)
	} else {
		found, err = seal.VerifyContents(ctx, tree, filepath.Join(dir, contentsFile), o.Contents, maxFindings, o.Reading)
	}
	if errors.Is(err, seal.ErrUnsealed) {
		digests := err
		if found, err = compareBlob(ctx, tree, e, o); errors.Is(err, blobs.ErrNotFound) || errors.Is(err, blobs.ErrCorrupt) {
			r.State, r.Reason = storage.StateUnverified, fmt.Sprintf("content was compared with nothing: digests: %v; blob: %v", digests, err)
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("compare the content of %q in %s: %w", e.Name, dir, err)
	}
	r.Deep = time.Now().UTC()
	if len(found) > 0 {
		r.State, r.Findings = storage.StateDamaged, found
	}
	return nil
}

// compareBlob compares a layer's content with the first blob of it that is
// good.
func compareBlob(ctx context.Context, tree string, e storage.CommitEntry, o CheckOptions) (found []seal.Finding, err error) {
	candidates, err := blobsOf(ctx, o.Blobs, e)
	for _, b := range candidates {
		if found, err = compareWith(ctx, tree, b, o); !errors.Is(err, blobs.ErrCorrupt) && !errors.Is(err, blobs.ErrNotFound) {
			break
		}
	}
	return found, err
}

func compareWith(ctx context.Context, tree string, b blobs.Blob, o CheckOptions) ([]seal.Finding, error) {
	tar, err := o.Blobs.Layer(ctx, b)
	if err != nil {
		return nil, err
	}
	defer tar.Close()
	digester := digest.Canonical.Digester()
	found, err := seal.VerifyTar(ctx, tree, io.TeeReader(tar, digester.Hash()), maxFindings, o.Reading)
	switch {
	case err != nil:
		err = o.Blobs.Blame(ctx, b, err)
	case digester.Digest() != b.DiffID:
		err = fmt.Errorf("%s holds %s, the image says %s: %w", b.Digest, digester.Digest(), b.DiffID, blobs.ErrCorrupt)
	}
	return found, err
}

// unreadable makes a finding out of an error that means: the disk does not give
// back what was written.
func unreadable(tree string, err error) (seal.Finding, bool) {
	var path *os.PathError
	if !seal.Unreadable(err) || !errors.As(err, &path) {
		return seal.Finding{}, false
	}
	rel, relErr := filepath.Rel(tree, path.Path)
	if relErr != nil {
		rel = path.Path
	}
	return seal.Finding{Path: rel, What: "unreadable", Have: path.Err.Error()}, true
}
