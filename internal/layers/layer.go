package layers

import (
	"cmp"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/internal/finding"
	"github.com/durable-snapshotter/durable-snapshotter/internal/idle"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// layer is one committed snapshot. Its fields are guarded by table.mu.
type layer struct {
	entry     storage.CommitEntry
	state     storage.StateEntry
	order     uint64     // of the verification that state rests on
	work      *work      // the verification, or the heal, in progress
	heals     idle.Pause // of attempts to heal it
	noBlob    bool       // the last one failed because there is no good blob
	named     bool       // an operator wants it extracted again, damaged or not
	there     time.Time  // when an lstat that found its directory began; zero after a change of state
	announced bool       // OnReady was called since a caller was refused the layer
	broken    error      // a panic in work on the layer: nothing more is tried by this process
	digests   idle.Pause // of attempts to take content digests
	agrees    string     // digests of the layer and of those below, with which what it has inherited was compared, and agrees
}

// work in progress on a layer; done is closed when it ends.
type work struct {
	done  chan struct{}
	begun time.Time
}

func (l *layer) describe() string {
	return fmt.Sprintf("layer %s (snapshots/%d)", cmp.Or(l.entry.ChainID, l.entry.Name), l.entry.ID)
}

// DamagedError is returned for a committed snapshot that is damaged and could not be healed. It is
// FailedPrecondition to containerd; docs/design.md has what containerd does with each kind of error.
type DamagedError struct {
	ID        uint64
	Name      string
	Namespace string // containerd's, "" when not known
	ChainID   string // "" when not known
	Findings  []finding.Finding
	Reason    string // why it was not healed
	// NoBlob: there is no good blob to heal it from. Only another pull can
	// help, and containerd makes none before it has forgotten the layer.
	NoBlob bool
}

func (l *layer) damaged() *DamagedError {
	return &DamagedError{
		ID: l.entry.ID, Name: l.entry.Name, Namespace: l.entry.Namespace, ChainID: l.entry.ChainID,
		Findings: l.state.Findings, Reason: l.state.Reason, NoBlob: l.noBlob,
	}
}

// Error implements error.
func (e *DamagedError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "layer %s (snapshots/%d) is damaged", cmp.Or(e.ChainID, e.Name), e.ID)
	if len(e.Findings) > 0 {
		fmt.Fprintf(&b, ": %q", e.Findings[0].String())
	}
	if e.Reason != "" {
		fmt.Fprintf(&b, ": not healed: %s", e.Reason)
	}
	return b.String()
}

// Unwrap returns the kind of the error.
func (e *DamagedError) Unwrap() error { return errdefs.ErrFailedPrecondition }
