package images

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/durable-snapshotter/durable-snapshotter/internal/library"
	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
)

// Verdict is what can be expected of an image.
type Verdict string

const (
	// Ready: it runs, and all its content is there.
	Ready Verdict = "ready"
	// Incomplete: it runs, but layer blobs are missing or bad: it can neither be unpacked
	// again, nor pushed, nor healed.
	Incomplete Verdict = "ready, content incomplete"
	// Healable: layers are damaged, or only containerd has them, and their blobs are good.
	Healable Verdict = "healable"
	// NeedsFetch: it does not run, and content that is missing or bad must be fetched.
	NeedsFetch Verdict = "needs fetch"
	// InUse: a layer is not ready, nothing on this node can repair it, and a container, or
	// another snapshot, stands on it.
	InUse Verdict = "in use and broken"
	// NotOurs: only another snapshotter has it unpacked.
	NotOurs Verdict = "not ours"
	// NotUnpacked: no snapshotter has it unpacked, and its content is good, as after an
	// import. The CRI plugin unpacks it when it creates a container.
	NotUnpacked Verdict = "not unpacked"
	// Pulling: something is missing that a pull is bringing at this time.
	Pulling Verdict = "being pulled"
	// Unknown: containerd, or the snapshotter, gave no answer that it depends on.
	Unknown Verdict = "cannot say"
)

// Bad reports whether the image is known not to run as it is.
func (v Verdict) Bad() bool { return v == Healable || v == NeedsFetch || v == InUse }

// State is what is known of a layer.
type State string

const (
	// LayerReady: both sides have it, and its tree is as its seal has it.
	LayerReady State = "ready"
	// LayerDamaged: its tree was verified, and is not whole.
	LayerDamaged State = "damaged"
	// LayerLost: containerd has it on record, and the snapshotter has not. No pull gets past
	// such a key, because containerd reports that the layer exists.
	LayerLost State = "lost"
	// LayerAbsent: containerd does not have it on record.
	LayerAbsent State = "not unpacked"
	// LayerUnknown: it could not be verified.
	LayerUnknown State = "unverified"
)

// Layer is one layer of an image.
type Layer struct {
	ChainID string        `json:"chain_id"`
	State   State         `json:"state"`
	Finding string        `json:"finding,omitempty"` // what is wrong with its tree, or why it is not verified
	ID      uint64        `json:"id,omitempty"`      // of its directory
	Name    string        `json:"name,omitempty"`    // the snapshotter's own
	Blob    digest.Digest `json:"blob,omitempty"`
	Flaw    string        `json:"flaw,omitempty"` // of its blob
	// Source is what it can be extracted from again: the digest of a blob, or a place outside of
	// containerd's content store; "" when nothing is known. It is determined for layers that
	// are not ready.
	Source string `json:"source,omitempty"`

	deep bool // its damage was found by its content
}

// Holder stands on a layer that is not ready.
type Holder struct {
	Text string `json:"text"` // what it is, with its identifier
	// Exited: a container without a process. Its snapshot can be removed, and with it what
	// the container has written.
	Exited bool `json:"exited"`

	key string // of its snapshot
}

// Fetch is what a pull would have to bring.
type Fetch struct {
	Blobs []repull.Blob `json:"blobs"`
	Bytes int64         `json:"bytes"` // of the blobs whose sizes are known
	// AtLeast: an index or a manifest is among them, so there may be more.
	AtLeast bool     `json:"at_least,omitempty"`
	From    []string `json:"from,omitempty"` // registries
}

// Image is an image for one platform, in one namespace.
type Image struct {
	Name      string        `json:"image"`
	Names     []string      `json:"names"` // all that have the same target
	Namespace string        `json:"namespace"`
	Platform  string        `json:"platform,omitempty"`
	Target    digest.Digest `json:"target"`             // of the names: an index, or the manifest
	Manifest  digest.Digest `json:"manifest,omitempty"` // "" when nothing leads to one
	Verdict   Verdict       `json:"verdict"`
	Reason    string        `json:"reason,omitempty"`
	Layers    []Layer       `json:"layers"` // lowest first
	Fetch     *Fetch        `json:"fetch,omitempty"`
	Holders   []Holder      `json:"holders,omitempty"`

	facts facts
	entry entry
	space *space
}

// Unpacked returns the names of the snapshots with which containerd has noted that snapshotters
// have the image, by snapshotter. They may be gone since.
func (i Image) Unpacked() map[string]string {
	return i.space.lib.Unpackers(i.entry.manifest.Config)
}

// Config is the digest of the image's config, "" when it is not known.
func (i Image) Config() digest.Digest { return i.entry.manifest.Config }

// Chain returns the names of the image's snapshots, lowest first.
func (i Image) Chain() []string { return i.entry.manifest.Chain() }

// facts are what a verdict is made of.
type facts struct {
	layers    []Layer
	documents []repull.Blob // that are missing or bad
	blobs     []repull.Blob // of layers, that are missing or bad
	holders   []Holder      // of what is broken
	work      string        // what a pull is doing at this time
	others    []string      // snapshotters that have the whole image
	unclear   error         // what kept something from being examined
}

// having selects the layers of a state.
func (f facts) having(states ...State) (found []Layer) {
	for _, l := range f.layers {
		if slices.Contains(states, l.State) {
			found = append(found, l)
		}
	}
	return found
}

// judge decides by the facts alone. What is known to be bad comes before what is not
// known, and a pull at work before what it is bringing.
func judge(f facts) (Verdict, string) {
	broken, absent := f.having(LayerDamaged, LayerLost), f.having(LayerAbsent)
	incomplete := len(f.documents)+len(f.blobs)+len(absent) > 0
	switch {
	case f.work != "" && len(f.having(LayerDamaged)) == 0 && (incomplete || len(broken) > 0):
		return Pulling, f.work
	case len(broken) > 0:
		return judgeBroken(f, broken)
	case f.unclear != nil:
		return Unknown, f.unclear.Error()
	case len(f.documents) > 0:
		return NeedsFetch, "not usable: " + flaws(f.documents)
	case len(f.having(LayerUnknown)) > 0:
		l := f.having(LayerUnknown)[0]
		return Unknown, f.place(l) + " could not be verified: " + l.Finding
	case len(absent) > 0:
		return judgeAbsent(f, absent)
	case len(f.blobs) > 0:
		return Incomplete, fmt.Sprintf("it runs; %d of %d layer blobs are not usable: %s", len(f.blobs), len(f.layers), flaws(f.blobs))
	}
	return Ready, ""
}

// judgeBroken is judge for an image with layers that are damaged or lost. A damaged one is
// healed under its containers. A lost one is not: its key must go first, and containerd
// refuses that while anything stands on it.
func judgeBroken(f facts, broken []Layer) (Verdict, string) {
	lost := slices.ContainsFunc(broken, func(l Layer) bool { return l.State == LayerLost })
	bad := slices.IndexFunc(broken, func(l Layer) bool { return l.Source == "" })
	worst := broken[max(0, bad)]
	text := f.place(worst) + " is damaged"
	if worst.State == LayerLost {
		text = f.place(worst) + " is on record at containerd only"
	}
	if worst.Finding != "" {
		text += " (" + worst.Finding + ")"
	}
	if bad < 0 && len(f.documents) == 0 && (!lost || len(f.holders) == 0) {
		return Healable, text + "; " + worst.good()
	}
	switch {
	case worst.Source != "":
		text += "; " + worst.good()
	case worst.Flaw != "":
		text += "; its blob is " + worst.Flaw
	default:
		text += "; no blob of it is known"
	}
	if len(f.documents) > 0 {
		text += "; " + flaws(f.documents)
	}
	// Without documents, damaged layers with good blobs can still be healed: a daemon goes
	// by any manifest that leads to them.
	if bad < 0 && !lost {
		return NeedsFetch, text
	}
	if len(f.holders) > 0 {
		return InUse, holdersOf(f.holders) + ": " + text
	}
	return NeedsFetch, text
}

// good describes what a layer can be extracted from again.
func (l Layer) good() string {
	if d := digest.Digest(l.Source); d.Validate() == nil {
		return "its blob is good"
	}
	return "to be had from " + l.Source
}

// judgeAbsent is judge for an image with layers that containerd does not have on record.
func judgeAbsent(f facts, absent []Layer) (Verdict, string) {
	bad := slices.IndexFunc(absent, func(l Layer) bool { return l.Flaw != "" })
	cannot := ""
	if bad >= 0 {
		cannot = fmt.Sprintf("%s cannot be unpacked: its blob is %s", f.place(absent[bad]), absent[bad].Flaw)
	}
	if len(f.others) > 0 {
		return NotOurs, strings.TrimSuffix(fmt.Sprintf("unpacked in %s; %s", strings.Join(f.others, ", "), cannot), "; ")
	}
	if bad >= 0 {
		return NeedsFetch, cannot
	}
	return NotUnpacked, fmt.Sprintf("%d of %d layers; unpacked when a container is created", len(f.layers)-len(absent), len(f.layers))
}

// place is the number of a layer, and the beginning of its chain ID.
func (f facts) place(l Layer) string {
	i := slices.IndexFunc(f.layers, func(o Layer) bool { return o.ChainID == l.ChainID })
	return fmt.Sprintf("layer %d of %d, %s,", i+1, len(f.layers), short(l.ChainID))
}

// short is a digest that people can compare.
func short(d string) string {
	_, hex, _ := strings.Cut(d, ":")
	return cmp.Or(hex[:min(12, len(hex))], d)
}

func flaws(bad []repull.Blob) string {
	var parts []string
	for _, b := range bad[:min(3, len(bad))] {
		parts = append(parts, fmt.Sprintf("blob %s is %s", short(b.Digest.String()), b.Flaw))
	}
	if len(bad) > 3 {
		parts = append(parts, fmt.Sprintf("and %d more", len(bad)-3))
	}
	return strings.Join(parts, ", ")
}

func holdersOf(all []Holder) string {
	var parts []string
	for _, h := range all[:min(3, len(all))] {
		text := h.Text
		if h.Exited {
			text += " (no process)"
		}
		parts = append(parts, text)
	}
	if len(all) > 3 {
		parts = append(parts, fmt.Sprintf("and %d more", len(all)-3))
	}
	return "held by " + strings.Join(parts, ", ")
}

// fetch is what a pull of the image would have to bring, nil for nothing.
func (f facts) fetch(lib *library.Library, name string, target digest.Digest) *Fetch {
	all := slices.Concat(f.documents, f.blobs)
	if len(all) == 0 {
		return nil
	}
	got := &Fetch{Blobs: all, AtLeast: len(f.layers) == 0, From: lib.Sources(target)}
	for _, b := range all {
		got.Bytes += b.Size
	}
	if host, _, ok := strings.Cut(name, "/"); ok && len(got.From) == 0 && strings.ContainsAny(host, ".:") {
		got.From = []string{host}
	}
	return got
}
