//go:build !faults

package snapshotter

import (
	"context"

	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// The release binary has no planted defects; see mutant_on.go.

func (s *Snapshotter) mutantPrepared(*active) {}

func (s *Snapshotter) mutantSync(*active) (bool, error) { return false, nil }

func (s *Snapshotter) mutantCommit(context.Context, *active, func(context.Context, *storage.Journal) error) bool {
	return false
}

func mutantHealed(dir string) string { return dir }

func (s *Snapshotter) mutantSwap(string, storage.CommitEntry, func(storage.StateEntry, bool) error) (bool, error) {
	return false, nil
}

func (s *Snapshotter) mutantBelieves(*storage.CommitEntry) bool { return false }
