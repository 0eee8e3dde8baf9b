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
