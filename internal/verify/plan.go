package verify

import (
	"cmp"
	"context"

	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Plan explains what can be done for a layer that was verified, and whether it is to be
// extracted again. named: an operator has named it. It finds the blob, of which the
// result speaks then.
func (r *Result) Plan(ctx context.Context, from blobs.Source, e storage.CommitEntry, named bool) (plan string, again bool) {
	damaged := r.State == storage.StateDamaged || r.State == storage.StateHealing
	if r.State == storage.StateReady {
		return "", false
	}
	r.FindBlob(ctx, from)
	switch {
	case damaged && !r.found():
		return "cannot be healed: " + r.NoBlob, true
	case r.found() && (damaged || named):
		return "extract again from " + cmp.Or(r.Place, r.Blob), true
	case r.State == storage.StateUnverified && e.Digest == "" && !r.found():
		return "none; it was never sealed, and there is nothing to extract it again from: " + r.NoBlob, false
	case r.State == storage.StateUnverified && e.Digest == "":
		return "none; name it to extract it again, which seals it", false
	}
	return "none", false
}
