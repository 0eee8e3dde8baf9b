package verify

import (
	"context"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
	"github.com/durable-snapshotter/durable-snapshotter/internal/finding"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Result is what a verification of one committed snapshot found.
type Result struct {
	ID       uint64            `json:"id"`
	Name     string            `json:"name"`
	ChainID  string            `json:"chain_id,omitempty"`
	Parent   string            `json:"parent_chain_id,omitempty"` // chain ID of the layer below, when known
	State    storage.State     `json:"state"`
	Entries  int64             `json:"entries"`
	Bytes    int64             `json:"bytes"`
	Sealed   time.Time         `json:"sealed"`
	Checked  time.Time         `json:"checked,omitzero"`   // when the daemon verified it last; of a result of Layer, now
	Deep     time.Time         `json:"deep,omitzero"`      // when its content was last found whole
	Contents string            `json:"contents,omitempty"` // digest of its content digests, when there are any
	Findings []finding.Finding `json:"findings"`           // the first of them
	Reason   string            `json:"reason,omitempty"`   // of unverified, or why it was not healed

	// Blob is the digest of a blob that the layer can be extracted from again, Place where it
	// lies outside of the content store; in an archive it may have no digest. Without either,
	// NoBlob is the reason. Lacking: nothing could heal the layer.
	Blob    string `json:"blob,omitempty"`
	Place   string `json:"place,omitempty"`
	NoBlob  string `json:"no_blob,omitempty"`
	Lacking bool   `json:"lacking,omitempty"`

	// Depth is how much was compared; of a damaged layer, by the verification
	// that found the damage. "" when nothing was compared.
	Depth storage.Depth `json:"depth,omitempty"`

	Ref    storage.Ref `json:"-"` // of the tree that was verified
	Order  uint64      `json:"-"` // of the beginning of this verification among all of the daemon's; 0 outside of it
	noSeal bool        // damaged because the disk does not return the seal
}

// NotComparable is the state, in a Result only, of a layer whose metadata is as its
// seal has it and whose content cannot be compared: content digests were not taken
// yet, and there is no good blob.
const NotComparable storage.State = "not comparable"

// MaxFindings bounds the findings of one snapshot: a layer that is gone has as
// many as it had entries. maxFinding bounds the bytes of each value in one: an
// extended attribute has up to 64 KiB, and a state that is too large for the
// journal would keep all others out of it.
const (
	MaxFindings = 100
	maxFinding  = 256
)

// New is the result of a verification of a layer that has not begun.
func New(e storage.CommitEntry) Result {
	return Result{
		ID: e.ID, Name: e.Name, ChainID: e.ChainID, Parent: layout.ChainIDOf(e.Parent, nil), Ref: e.Ref(),
		Entries: e.Entries, Bytes: e.Bytes, Sealed: e.Time, Findings: []finding.Finding{},
	}
}

// Known is what is on record of a layer, in the form of a verification.
func Known(e storage.CommitEntry, s storage.StateEntry) Result {
	r := New(e)
	r.State, r.Reason, r.Checked, r.Deep, r.Contents, r.Depth = s.State, s.Reason, s.Checked, s.Deep, s.Contents, s.Depth
	r.Findings = append(r.Findings, s.Findings...)
	return r
}

// With is the result in the light of what was known before: damage that was found
// at a greater depth is there still.
func (r Result) With(known Result) Result {
	damaged := known.State == storage.StateDamaged || known.State == storage.StateHealing
	if !damaged || !known.Ref.Same(r.Ref) || r.State == storage.StateDamaged || r.Depth.Covers(known.Depth) {
		return r
	}
	known.Checked = r.Checked
	return known
}

// FindBlob finds a blob of the layer. A content store that is not there, or a blob that
// cannot be extracted here, is no evidence that there is none.
func (r *Result) FindBlob(ctx context.Context, from blobs.Source) {
	r.Blob, r.Place, r.NoBlob, r.Lacking = "", "", "", false
	found, err := from.Find(ctx, blobs.Layer{ChainID: r.ChainID, Parent: r.Parent, Entries: r.Entries, Bytes: r.Bytes})
	if err != nil {
		r.NoBlob, r.Lacking = err.Error(), blobs.Bad(err)
		return
	}
	r.Blob, r.Place = found[0].Digest.String(), found[0].Place
}

// found reports whether FindBlob has found one.
func (r *Result) found() bool { return r.Blob != "" || r.Place != "" }

// Damaged makes the result that of a damaged layer.
func (r *Result) Damaged(found ...finding.Finding) {
	r.State = storage.StateDamaged
	for _, f := range found {
		f.Want, f.Have = shorten(f.Want), shorten(f.Have)
		r.Findings = append(r.Findings, f)
	}
}

func shorten(value string) string {
	if len(value) <= maxFinding {
		return value
	}
	return value[:maxFinding] + "…"
}
