package snapshotter

import (
	"fmt"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/userns"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
)

// isRebase reports whether a snapshot is an extraction that learns of its
// parent at Commit: containerd unpacks the layers of an image in parallel when
// a snapshotter has the capability "rebase".
func isRebase(info snapshots.Info) bool {
	return info.Parent == "" && info.Labels[layout.LabelParentChainID] != ""
}

// checkRebase refuses a parallel extraction where it cannot be right.
func checkRebase(info snapshots.Info) error {
	if isRebase(info) && userns.RunningInUserNS() {
		return fmt.Errorf("parallel unpack: in a user namespace the applier cannot make whiteouts without the parent; "+
			"take \"rebase\" out of the capabilities of the proxy plugin: %w", errdefs.ErrFailedPrecondition)
	}
	return nil
}
