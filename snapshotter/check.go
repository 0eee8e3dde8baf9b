package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// The results of a look at a committed snapshot.
const (
	StateReady      = "ready"      // it is what its seal says
	StateDamaged    = "damaged"    // it is not
	StateUnverified = "unverified" // it has no valid seal, so nobody can say
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
	Findings []seal.Finding `json:"findings"`         // the first of them
	Reason   string         `json:"reason,omitempty"` // of unverified
}

// maxFindings bounds the findings of one snapshot: a layer that is gone has as
// many as it had entries.
const maxFindings = 100

// Check compares the layer of a journal entry with its seal: every name, and of
// each the type, mode, owner, size, times, links and extended attributes.
// Content is not read. It writes nothing, and needs no daemon.
func Check(ctx context.Context, root string, e storage.CommitEntry) (CheckResult, error) {
	r := CheckResult{
		ID: e.ID, Name: e.Name, ChainID: e.ChainID, State: StateReady,
		Entries: e.Entries, Bytes: e.Bytes, Sealed: e.Time, Findings: []seal.Finding{},
	}
	if e.Digest == "" {
		r.State, r.Reason = StateUnverified, fmt.Sprintf("never sealed: committed with strategy %q", e.Strategy)
		return r, nil
	}
	dir := snapshotDir(root, e.ID)
	found, err := seal.Verify(ctx, filepath.Join(dir, "fs"), filepath.Join(dir, sealFile), e.Digest, maxFindings)
	switch {
	case errors.Is(err, seal.ErrUnsealed):
		r.State, r.Reason = StateUnverified, err.Error()
		if _, err := os.Lstat(filepath.Join(dir, "fs")); errors.Is(err, os.ErrNotExist) {
			r.State, r.Reason = StateDamaged, ""
			r.Findings = append(r.Findings, seal.Finding{Path: ".", What: "missing"})
		}
		return r, nil
	case err != nil:
		return r, fmt.Errorf("look at %q in %s: %w", e.Name, dir, err)
	case len(found) > 0:
		r.State, r.Findings = StateDamaged, found
	}
	return r, nil
}
