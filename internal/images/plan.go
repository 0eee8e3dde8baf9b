package images

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/durable-snapshotter/durable-snapshotter/internal/refill"
	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
)

// Action is a kind of repair. They are listed from the least to the most destructive.
type Action string

const (
	// ActHeal extracts damaged layers again in place. Containers may stand on them.
	ActHeal Action = "heal"
	// ActDropBlobs deletes the rows and files of bad blobs, so that they can be fetched:
	// containerd takes a file of which it has a row for the blob, whatever is in it.
	ActDropBlobs Action = "drop blobs"
	// ActFetch puts back what is missing or bad from image archives, see [refill.PutBack], or has
	// containerd fetch it from the registry that the image came from, see [refill.FetchImage],
	// and heals damaged layers from it.
	ActFetch Action = "fetch"
	// ActUnpack removes the snapshots from the lowest that is not ready upwards from
	// containerd's records, and unpacks the layers again from their blobs.
	ActUnpack Action = "unpack"
	// ActDropLayer makes containerd forget a layer, the images that have it and their bad
	// blobs: [repull.Containerd.Drop].
	ActDropLayer Action = "drop layer"
	// ActDropNames deletes the names of the image, and its bad blobs.
	ActDropNames Action = "drop names"
)

// actions are all of them, in their order.
var actions = []Action{ActHeal, ActDropBlobs, ActFetch, ActUnpack, ActDropLayer, ActDropNames}

// Step is a part of a repair.
type Step struct {
	Action Action `json:"action"`
	Text   string `json:"text"`

	layers []Layer // healed, or the one that is dropped
	blobs  []repull.Blob
	wanted refill.Wanted
}

// Repair is what can be done about an image, and what was done.
type Repair struct {
	Image
	Plan []Step `json:"plan"`
	// Blocked is why the plan does not make the image ready, or a pull of it clean.
	Blocked string `json:"blocked,omitempty"`
	Done    string `json:"done,omitempty"`
	// Dropped: the names of the image are gone, and the next pull brings it.
	Dropped bool `json:"dropped,omitempty"`
}

// RepairOptions of Plan and Apply.
type RepairOptions struct {
	// Force removes the snapshots of containers without a process that stand on a layer which
	// must be dropped, with what they have written. The containers themselves stay on record.
	Force       bool
	ContentRoot string // as configured, for error messages
	// Registry allows ActFetch to have containerd fetch. Hosts is the directory with containerd's configuration of
	// registries.
	Registry bool
	Hosts    string
	// Limit is the most destructive action that is taken; "": all are.
	Limit Action
	// fetched: what ActFetch did not bring, it does not bring now.
	fetched bool

	// Heal heals damaged layers in place, as far as there are good bytes, and returns what it
	// did with each. ids are those of their directories. What it cannot heal is no error.
	Heal func(ctx context.Context, ids []uint64, deep bool) (map[uint64]string, error)
	// Confirm verifies a damaged layer again, as deep, and returns nil only when it is
	// damaged still.
	Confirm func(ctx context.Context, row Row, deep bool) error
}

// repairer is the part of a Checker that repairs.
type repairer struct{ *Checker }

// Plan returns what can be done about the images that are not ready, the least destructive
// first. It changes nothing.
func (c *Checker) Plan(ctx context.Context, found []Image, o RepairOptions) ([]Repair, error) {
	repairs := []Repair{}
	for _, i := range found {
		r, err := repairer{c}.plan(namespaces.WithNamespace(ctx, i.Namespace), i, o)
		if err != nil {
			return nil, err
		}
		if len(r.Plan) > 0 || r.Blocked != "" {
			repairs = append(repairs, r)
		}
	}
	return repairs, nil
}

// plan is Plan for one image. The error is that of ctx.
func (c repairer) plan(ctx context.Context, i Image, o RepairOptions) (Repair, error) {
	r := Repair{Image: i, Plan: []Step{}}
	if damaged := i.facts.having(LayerDamaged); len(damaged) > 0 {
		text := fmt.Sprintf("verify %s again, and extract in place from ", count(len(damaged), "damaged layer"))
		var from []string
		for _, l := range damaged {
			if l.Source != "" {
				from = append(from, short(l.Source))
			}
		}
		if len(from) < len(damaged) {
			from = append(from, "whatever else has the bytes")
		}
		r.Plan = append(r.Plan, Step{Action: ActHeal, Text: text + strings.Join(from, ", "), layers: damaged})
	}
	healing := len(r.Plan) > 0
	step, blocked, err := c.next(ctx, i, o, healing)
	if err == nil && step != nil && step.Action == ActFetch {
		r.Plan = append(r.Plan, *step)
		o.fetched = true
		if step, blocked, err = c.next(ctx, i, o, healing); step != nil {
			step.Text = "if that fails: " + step.Text
		}
	}
	if step != nil {
		r.Plan = append(r.Plan, *step)
	}
	r.Blocked = blocked
	return r, err
}

func count(n int, of string) string {
	if n == 1 {
		return "1 " + of
	}
	return fmt.Sprintf("%d %ss", n, of)
}

// next is the least destructive step after an attempt to heal, nil for none; healing: that
// attempt is still to come. blocked is why nothing makes the image ready. The error is that
// of ctx.
func (c repairer) next(ctx context.Context, i Image, o RepairOptions, healing bool) (step *Step, blocked string, err error) {
	step, blocked, err = c.least(ctx, i, o, healing)
	switch {
	case step == nil || err != nil:
		return nil, blocked, err
	case o.Limit != "" && slices.Index(actions, step.Action) > slices.Index(actions, o.Limit):
		return nil, "left to an operator: " + step.Text, nil
	case step.Action == ActUnpack:
		return step, blocked, nil
	}
	there, err := c.storeThere(ctx, i.space)
	if err != nil {
		return nil, "", err
	}
	if !there {
		return nil, fmt.Sprintf("no blob on record in namespace %s is in the content store %s, which is probably not mounted: nothing is removed", i.Namespace, c.root), nil
	}
	return step, blocked, nil
}

// storeThere reports whether the content store has any blob that a namespace has on record.
// Where it has none, a blob that is missing shows nothing. The error is that of ctx.
func (c repairer) storeThere(ctx context.Context, s *space) (bool, error) {
	for _, info := range s.lib.Blobs {
		if flaw, err := c.view.Library().Sized(ctx, info, c.root); flaw == "" && err == nil {
			return true, nil
		}
		if ctx.Err() != nil {
			return false, ctx.Err()
		}
	}
	return len(s.lib.Blobs) == 0, nil
}

// fetch is the step that brings back what keeps an image from being repaired on this node, nil
// when there is no such thing, or no source is known. Blobs of ready layers that are missing are
// not fetched: containerd may be configured to discard them.
func (c repairer) fetch(i Image, o RepairOptions) *Step {
	f := i.facts
	if o.fetched || i.Manifest == "" || i.Verdict != Incomplete && i.Verdict != NeedsFetch && i.Verdict != InUse {
		return nil
	}
	s := &Step{Action: ActFetch, blobs: slices.Clone(f.documents)}
	for _, b := range f.blobs {
		_, onRecord := i.space.lib.Blobs[b.Digest]
		ready := !slices.ContainsFunc(f.layers, func(l Layer) bool { return l.Blob == b.Digest && l.State != LayerReady })
		if onRecord || !ready {
			s.blobs = append(s.blobs, b)
		}
	}
	s.wanted = refill.Wanted{
		Layer:   repull.Layer{Namespace: i.Namespace},
		Library: i.space.lib, Manifest: i.entry.manifest, Names: i.Names, Target: i.Target, Platform: parsed(i.Platform),
	}
	for _, b := range s.blobs {
		s.wanted.Needed = append(s.wanted.Needed, b.Digest)
	}
	var from []string
	if c.o.Archives != nil && len(s.blobs) > len(f.documents) {
		from = append(from, "put back from an image archive")
	}
	if refs := s.wanted.References(); o.Registry && len(refs) > 0 {
		host, _, _ := strings.Cut(refs[0], "/")
		from = append(from, "have containerd fetch from "+host)
	}
	if len(s.blobs) == 0 || len(from) == 0 {
		return nil
	}
	s.Text = fmt.Sprintf("%s what is not usable: %s", strings.Join(from, ", or else "), flaws(s.blobs))
	return s
}

// parsed is the platform that platformOf has written.
func parsed(platform string) ocispec.Platform {
	part := append(strings.SplitN(platform, "/", 3), "", "")
	return ocispec.Platform{OS: part[0], Architecture: part[1], Variant: part[2]}
}

// least is next without the conditions that are the same for each step.
func (c repairer) least(ctx context.Context, i Image, o RepairOptions, healing bool) (step *Step, blocked string, err error) {
	if s := c.fetch(i, o); s != nil {
		return s, "", nil
	}
	f := i.facts
	broken := f.having(LayerDamaged, LayerLost)
	unhealable := slices.DeleteFunc(slices.Clone(broken), func(l Layer) bool { return l.Source != "" })
	switch {
	case i.Verdict == Unknown:
		return nil, i.Reason, nil
	case i.Verdict == Incomplete:
		bad := i.onRecord(f.blobs)
		fetch := fmt.Sprintf("ctr -n %s content fetch %s", i.Namespace, i.Name)
		if len(bad) == 0 {
			return nil, fmt.Sprintf("%s missing: %s", count(len(f.blobs), "layer blob"), fetch), nil
		}
		return &Step{Action: ActDropBlobs, Text: fmt.Sprintf("drop %s; then fetch: %s", flaws(bad), fetch), blobs: bad}, "", nil
	case i.Verdict == NotUnpacked && i.wasUnpacked():
		return &Step{Action: ActUnpack, Text: "unpack again from its blobs: it was unpacked before"}, "", nil
	case len(unhealable) > 0:
		return c.nextUnhealable(ctx, i, o, unhealable)
	case len(broken) > 0 && healing && len(f.having(LayerLost)) == 0:
		if len(f.documents) > 0 {
			return i.dropNames(), "", nil
		}
		return nil, "", nil
	case len(broken) > 0 && len(f.holders) > 0 && !(o.Force && allExited(f.holders)):
		return nil, holdersOf(f.holders) + ": " + i.Reason, nil
	case len(broken) > 0:
		return &Step{Action: ActUnpack, Text: fmt.Sprintf("remove the snapshots from %s upwards, and unpack again from the blobs", short(broken[0].ChainID))}, "", nil
	case i.Verdict == NeedsFetch:
		return i.dropNames(), "", nil
	}
	return nil, "", nil
}

// nextUnhealable is next for an image with layers of which no good blob is known.
func (c repairer) nextUnhealable(ctx context.Context, i Image, o RepairOptions, unhealable []Layer) (*Step, string, error) {
	f := i.facts
	if len(f.holders) > 0 && !(o.Force && allExited(f.holders)) {
		blocked := holdersOf(f.holders)
		if allExited(f.holders) {
			blocked += "; --force removes their snapshots, with what they have written"
		} else {
			blocked += "; remove what holds it, or bring its blobs back: ctr -n " + i.Namespace + " content fetch " + i.Name
		}
		var bad []repull.Blob
		for _, l := range unhealable {
			bad = append(bad, i.onRecord(slices.DeleteFunc(slices.Clone(f.blobs), func(b repull.Blob) bool { return b.Digest != l.Blob }))...)
		}
		if len(bad) == 0 {
			return nil, blocked, nil
		}
		return &Step{Action: ActDropBlobs, Text: "drop " + flaws(bad) + ", so that the blob can be fetched", blobs: bad}, blocked, nil
	}
	planned, err := c.view.Plan(ctx, layerOf(i, c.o.Snapshotter, unhealable[0]), c.dropOptions(o, nil))
	if ctx.Err() != nil {
		return nil, "", ctx.Err()
	}
	if err != nil {
		return nil, err.Error(), nil
	}
	text := fmt.Sprintf("drop %s, %s, %s; names: %s", count(len(planned.Snapshots)+1, "snapshot"), count(len(planned.Bad), "bad blob"),
		count(len(planned.Images), "image name"), strings.Join(planned.Images, " "))
	if len(f.holders) > 0 {
		text = fmt.Sprintf("remove the snapshots of %s; %s", strings.TrimPrefix(holdersOf(f.holders), "held by "), text)
	}
	return &Step{Action: ActDropLayer, Text: text, layers: unhealable[:1]}, "", nil
}

func allExited(all []Holder) bool {
	return !slices.ContainsFunc(all, func(h Holder) bool { return !h.Exited })
}

// onRecord are those of bad blobs of which the namespace has a row.
func (i Image) onRecord(bad []repull.Blob) (found []repull.Blob) {
	for _, b := range bad {
		if _, ok := i.space.lib.Blobs[b.Digest]; ok {
			found = append(found, b)
		}
	}
	return found
}

// wasUnpacked reports whether containerd has noted that our snapshotter had the image.
func (i Image) wasUnpacked() bool {
	chain := i.entry.manifest.Chain()
	return len(chain) > 0 && i.entry.manifest.Unpacked == chain[len(chain)-1]
}

// dropNames is the step that leaves nothing of an image but its good blobs, on lease.
func (i Image) dropNames() *Step {
	bad := i.onRecord(slices.Concat(i.facts.documents, i.facts.blobs))
	text := "delete the names of the image: " + strings.Join(i.Names, " ")
	if len(bad) > 0 {
		text = "drop " + flaws(bad) + "; " + text
	}
	return &Step{Action: ActDropNames, Text: text, blobs: bad}
}

func layerOf(i Image, snapshotter string, l Layer) repull.Layer {
	return repull.Layer{Namespace: i.Namespace, Snapshotter: snapshotter, ChainID: digest.Digest(l.ChainID)}
}

func (c repairer) dropOptions(o RepairOptions, confirm func(context.Context) error) repull.Options {
	return repull.Options{Rows: rows{c.Checker}, ContentRoot: o.ContentRoot, Confirm: confirm}
}

// rows are the rows of the snapshotter as package repull reads them.
type rows struct{ c *Checker }

// Walk calls f with each row.
func (r rows) Walk(ctx context.Context, f snapshots.WalkFunc, _ ...string) error {
	all, err := r.c.o.Rows(ctx)
	if err != nil {
		return err
	}
	for _, row := range all {
		kind := snapshots.KindActive
		if row.Committed {
			kind = snapshots.KindCommitted
		}
		if err := f(ctx, snapshots.Info{Kind: kind, Name: row.Name, Parent: row.Parent}); err != nil {
			return err
		}
	}
	return nil
}
