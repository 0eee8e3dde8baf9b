package refill

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	transferapi "github.com/containerd/containerd/api/services/transfer/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/protobuf/proto"
	anytypes "github.com/containerd/containerd/v2/pkg/protobuf/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/durable-snapshotter/durable-snapshotter/internal/library"
	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
)

// FetchOptions are how a blob is fetched.
type FetchOptions struct {
	Hosts       string // directory with containerd's configuration of registries; "" or missing: none
	ContentRoot string // as configured; an error names it when it is not containerd's
	// Confirm is called before anything is changed, as that of Options.
	Confirm func(context.Context) error
}

// FetchError is returned by Fetch when no registry has returned the blob.
type FetchError struct {
	Layer repull.Layer
	Refs  []string // that were tried
	Err   error    // of the last
	// Credentials: a registry wants some. Only the kubelet, or another client that has
	// them, can pull the image.
	Credentials bool
}

func (e *FetchError) Error() string {
	if len(e.Refs) == 0 {
		return fmt.Sprintf("fetch %s: nothing on record shows which registry has it", e.what())
	}
	why := ""
	if e.Credentials {
		why = "the registry wants credentials, which durable-snapshotter does not have: a pull by the kubelet, or by ctr with --user, brings the image back: "
	}
	return fmt.Sprintf("fetch %s from %s: %s%v", e.what(), strings.Join(e.Refs, ", "), why, e.Err)
}

func (e *FetchError) what() string {
	if e.Layer.ChainID == "" {
		return "blobs of an image in namespace " + e.Layer.Namespace
	}
	return fmt.Sprintf("the blob of %v", e.Layer)
}

func (e *FetchError) Unwrap() error { return e.Err }

const (
	// stalled is how long a registry may send nothing.
	stalled = 15 * time.Second
	// collectWithin bounds the collection after a fetch that has failed.
	collectWithin = 10 * time.Second
	// watched is how often that is checked.
	watched = time.Second
	// fetchedPrefix begins the name under which containerd records what it has fetched. It
	// is deleted at once. No registry has this host (RFC 2606).
	fetchedPrefix = "durable-snapshotter.invalid/fetched@"
	// leaseFor bounds the lease of a fetch, or of putting back, that is cut short.
	leaseFor = time.Hour
)

// Fetch has containerd fetch what it lacks to heal a layer, from the registry that the image
// came from, with containerd's own configuration and without credentials. Nothing is
// unpacked, and no name of an image changes. It returns nil when containerd has a good blob of
// the layer then, with the manifest and the config that lead to it.
//
// containerd takes a row for the blob, whatever is in the file. So the rows of the bad ones
// are deleted first, on the evidence that Drop requires; meanwhile a lease keeps all that
// they refer to. What is fetched is compared with its digest by containerd.
func Fetch(ctx context.Context, c repull.View, layer repull.Layer, o FetchOptions) (err error) {
	ctx, cancel := context.WithCancel(namespaces.WithNamespace(ctx, layer.Namespace))
	defer cancel()
	l, err := c.Library().Read(ctx, layer.Snapshotter)
	if err != nil {
		return err
	}
	root, err := c.ContentRoot(ctx)
	if err != nil {
		return err
	}
	if err := c.Evidence(ctx, layer, l, o.ContentRoot); err != nil {
		return err
	}
	all, err := c.Images(ctx)
	if err != nil {
		return err
	}
	failed := &FetchError{Layer: layer}
	for _, m := range l.Manifests {
		if m.Digest == "" || m.Above(layer.ChainID.String()) == nil {
			continue
		}
		refs := references(namesOf(l, m, all), l, m.Digest, m.Parts())
		if len(refs) == 0 {
			continue
		}
		if o.Confirm != nil {
			if err := o.Confirm(ctx); err != nil {
				return err
			}
		}
		f := newFetch(c, layer, l, m, root, o.Hosts)
		if d := m.Layer(layer.ChainID.String()); d != "" {
			f.needed = append(f.needed, d)
		}
		if done, goOn := f.from(ctx, refs, failed); done {
			return nil
		} else if !goOn {
			break
		}
	}
	return failed
}

// Wanted is an image whose content is to be fetched.
type Wanted struct {
	Layer    repull.Layer // its namespace and its snapshotter
	Library  *library.Library
	Manifest library.Manifest
	Names    []string
	Target   digest.Digest    // of the names: an index, or the manifest
	Platform ocispec.Platform // without an OS when it is not known
	Needed   []digest.Digest  // besides the documents, what must be good afterwards
}

// References are the names under which registries have the image, by digest.
func (w Wanted) References() []string {
	return references(w.Names, w.Library, w.Target, append(w.Manifest.Parts(), w.Target))
}

// FetchImage has containerd fetch what it lacks of an image, as Fetch does it for a layer: the
// bad blobs are read again before their rows are deleted, nothing is unpacked, and no name
// changes. The error is a FetchError when no registry has returned all of it.
func FetchImage(ctx context.Context, c repull.View, w Wanted, hosts string) error {
	ctx, cancel := context.WithCancel(namespaces.WithNamespace(ctx, w.Layer.Namespace))
	defer cancel()
	root, err := c.ContentRoot(ctx)
	if err != nil {
		return err
	}
	f := newFetch(c, w.Layer, w.Library, w.Manifest, root, hosts)
	f.digest, f.needed = w.Target, slices.Concat(f.needed, w.Needed)
	if w.Target != w.Manifest.Digest {
		f.needed = append(f.needed, w.Target)
	}
	if w.Platform.OS != "" {
		f.platforms = []*types.Platform{{OS: w.Platform.OS, Architecture: w.Platform.Architecture, Variant: w.Platform.Variant}}
	}
	failed := &FetchError{Layer: w.Layer}
	if done, _ := f.from(ctx, w.References(), failed); done {
		return nil
	}
	return failed
}

// wantsCredentials reports whether a registry has refused a request without credentials.
// Over gRPC only the text arrives.
func wantsCredentials(err error) bool {
	text := err.Error()
	return slices.ContainsFunc([]string{"401 Unauthorized", "403 Forbidden", "authorization failed", "insufficient_scope", "no basic auth credentials"},
		func(s string) bool { return strings.Contains(text, s) })
}

// namesOf are the names of the images that lead to a manifest.
func namesOf(l *library.Library, m library.Manifest, all []*imagesapi.Image) (names []string) {
	for _, i := range all {
		if _, ok := l.LeadsTo(digest.Digest(i.GetTarget().GetDigest()), map[digest.Digest]bool{m.Digest: true}); ok && !strings.HasPrefix(i.Name, fetchedPrefix) {
			names = append(names, i.Name)
		}
	}
	return names
}

// references returns under which names registries have a digest: a tag may mean another image
// by now. The names of the image come first, then what its blobs have on record.
func references(names []string, l *library.Library, want digest.Digest, parts []digest.Digest) (refs []string) {
	add := func(repository string) {
		host, path, ok := strings.Cut(repository, "/")
		if ref := repository + "@" + want.String(); ok && path != "" && (strings.ContainsAny(host, ".:") || host == "localhost") && !slices.Contains(refs, ref) {
			refs = append(refs, ref)
		}
	}
	for _, name := range names {
		name, _, _ := strings.Cut(name, "@")
		if colon := strings.LastIndex(name, ":"); colon > strings.LastIndex(name, "/") {
			name = name[:colon]
		}
		add(name)
	}
	for _, d := range parts {
		for label, paths := range sources(l.Blobs[d]) {
			for path := range strings.SplitSeq(paths, ",") {
				add(strings.TrimPrefix(label, sourceLabel) + "/" + path)
			}
		}
	}
	return refs
}

// fetch is the part of one call of Fetch that is about one manifest.
type fetch struct {
	c        repull.View
	layer    repull.Layer
	lib      *library.Library
	manifest library.Manifest
	root     string // of containerd's content store
	hosts    string

	digest    digest.Digest                             // that is requested: of the manifest, or of an index that leads to it
	platforms []*types.Platform                         // of an index; none: all
	needed    []digest.Digest                           // that must be good afterwards
	rows      map[digest.Digest]map[string]content.Info // of bad blobs, before they were deleted
}

// newFetch returns a fetch of the documents of a manifest. The caller adds to what is needed.
func newFetch(c repull.View, layer repull.Layer, l *library.Library, m library.Manifest, root, hosts string) *fetch {
	return &fetch{
		c: c, layer: layer, lib: l, manifest: m, root: root, hosts: hosts,
		digest: m.Digest, needed: m.Documents(), rows: map[digest.Digest]map[string]content.Info{},
	}
}

// from tries one reference after another, and adds to failed. goOn is false when no other
// manifest is to be tried either.
func (f *fetch) from(ctx context.Context, refs []string, failed *FetchError) (done, goOn bool) {
	for _, ref := range refs {
		failed.Refs = append(failed.Refs, ref)
		if failed.Err = f.run(ctx, ref); failed.Err == nil {
			return true, false
		}
		failed.Credentials = failed.Credentials || wantsCredentials(failed.Err)
		if ctx.Err() != nil || errdefs.IsNotImplemented(failed.Err) {
			return false, false
		}
	}
	return false, true
}

// run fetches from one reference.
func (f *fetch) run(ctx context.Context, ref string) (err error) {
	lease, err := f.keep(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.release(ctx, lease, err != nil)) }()
	if err := f.dropBad(ctx); err != nil {
		return err
	}
	err = f.transfer(leases.WithLease(ctx, lease.ID), ref)
	if err == nil {
		err = f.verify(ctx)
	}
	return errors.Join(err, f.restore(leases.WithLease(ctx, lease.ID)))
}

// release deletes the lease of a fetch. After one that has failed it waits for the collection,
// which removes what has begun to arrive: that would be taken for a pull at work.
func (f *fetch) release(ctx context.Context, lease leases.Lease, failed bool) error {
	if !failed {
		return f.c.Tidy(ctx, lease)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), collectWithin)
	defer cancel()
	if err := f.c.Leases().Delete(ctx, lease, leases.SynchronousDelete); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("delete lease %s: %w", lease.ID, err)
	}
	return nil
}

// keep leases all of the image, which the rows that are deleted may be alone to refer to.
func (f *fetch) keep(ctx context.Context) (leases.Lease, error) {
	lease, err := f.c.Leases().Create(ctx, leases.WithRandomID(), leases.WithExpiration(leaseFor))
	if err != nil {
		return lease, fmt.Errorf("lease an image: %w", err)
	}
	var all []leases.Resource
	for _, d := range append(f.manifest.Parts(), f.digest) {
		all = append(all, leases.Resource{ID: d.String(), Type: "content"})
	}
	if f.manifest.Unpacked != "" {
		all = append(all, leases.Resource{ID: f.manifest.Unpacked, Type: "snapshots/" + f.layer.Snapshotter})
	}
	for _, r := range all {
		if err := f.c.Leases().AddResource(ctx, lease, r); err != nil && !errdefs.IsNotFound(err) {
			return lease, errors.Join(fmt.Errorf("lease %s: %w", r.ID, err), f.c.Tidy(ctx, lease))
		}
	}
	return lease, nil
}

// dropBad deletes the rows and files of those blobs that are bad.
func (f *fetch) dropBad(ctx context.Context) error {
	var bad []repull.Blob
	for _, d := range f.needed {
		at, info, err := f.c.Record(ctx, f.lib, d)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return err
		}
		flaw, err := f.c.Library().Flaw(at, info, f.root)
		if err != nil {
			return err
		}
		if flaw == "" {
			continue
		}
		rows, err := rowsOf(ctx, f.c, d)
		if err != nil {
			return err
		}
		if len(rows) == 0 {
			continue // an earlier reference was tried
		}
		f.rows[d] = rows
		bad = append(bad, repull.Blob{Digest: d, Size: info.Size, Flaw: flaw})
	}
	if len(bad) == 0 {
		return nil
	}
	_, err := f.c.DropBlobs(ctx, f.layer, bad)
	return err
}

// transfer has containerd fetch what is missing of the manifest.
func (f *fetch) transfer(ctx context.Context, ref string) error {
	name := fetchedPrefix + f.digest.String()
	source, err := proto.Marshal(&transfer.OCIRegistry{Reference: ref, Resolver: &transfer.RegistryResolver{HostDir: f.hosts}})
	if err != nil {
		return err
	}
	destination, err := proto.Marshal(&transfer.ImageStore{Name: name, Platforms: f.platforms})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go f.watch(ctx, cancel)
	// containerd resolves the types by their bare names.
	_, err = f.c.Transfers().Transfer(ctx, &transferapi.TransferRequest{
		Source:      &anytypes.Any{TypeUrl: "containerd.types.transfer.OCIRegistry", Value: source},
		Destination: &anytypes.Any{TypeUrl: "containerd.types.transfer.ImageStore", Value: destination},
	})
	err = errgrpc.ToNative(err)
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	gone := context.WithoutCancel(ctx)
	if derr := f.c.DeleteName(gone, name); derr != nil && err == nil {
		err = derr
	}
	return err
}

// Sweep deletes, in all namespaces, the names of fetches that were cut short between
// containerd's record of one and its deletion: they would keep what was fetched for ever. One
// that is in progress does without its name.
func Sweep(ctx context.Context, c repull.View) error {
	all, err := c.Namespaces(ctx)
	if err != nil {
		return err
	}
	for _, ns := range all {
		ctx := namespaces.WithNamespace(ctx, ns)
		images, err := c.Images(ctx)
		if err != nil {
			return fmt.Errorf("namespace %s: %w", ns, err)
		}
		for _, i := range images {
			if !strings.HasPrefix(i.Name, fetchedPrefix) {
				continue
			}
			if err := c.DeleteName(ctx, i.Name); err != nil {
				return err
			}
		}
	}
	return nil
}

// errStalled ends a fetch from a registry that does not answer.
var errStalled = fmt.Errorf("nothing was received for %v", stalled)

// watch ends a fetch during which containerd receives nothing for long.
func (f *fetch) watch(ctx context.Context, cancel context.CancelCauseFunc) {
	last, since := "", time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(watched):
		}
		all, err := f.c.Content().ListStatuses(ctx)
		if err != nil {
			continue
		}
		var now strings.Builder
		for _, s := range all {
			fmt.Fprint(&now, s.Ref, s.Offset, " ")
		}
		if now.String() != last {
			last, since = now.String(), time.Now()
		}
		if time.Since(since) > stalled {
			cancel(errStalled)
			return
		}
	}
}

// verify returns an error unless all that is needed is good now.
func (f *fetch) verify(ctx context.Context) error {
	for _, d := range f.needed {
		info, err := f.c.Content().Info(ctx, d)
		if err != nil {
			return fmt.Errorf("blob %s after it was fetched: %w", d, err)
		}
		flaw, err := f.c.Library().Flaw(ctx, info, f.root)
		if err != nil {
			return err
		}
		if flaw != "" {
			return fmt.Errorf("blob %s is %s after it was fetched", d, flaw)
		}
	}
	return nil
}

// restore gives the fetched blobs the labels that the deleted rows had, by which a config
// keeps its snapshots, and the other namespaces their rows.
func (f *fetch) restore(ctx context.Context) error {
	for d, rows := range f.rows {
		now, err := f.c.Content().Info(ctx, d)
		if errdefs.IsNotFound(err) {
			continue // not fetched
		}
		if err != nil {
			return fmt.Errorf("label blob %s: %w", d, err)
		}
		if was, ok := rows[f.layer.Namespace]; ok {
			for label, value := range was.Labels {
				if now.Labels[label] == "" {
					if now.Labels == nil {
						now.Labels = map[string]string{}
					}
					now.Labels[label] = value
				}
			}
			if _, err := f.c.Content().Update(ctx, now, "labels"); err != nil && !errdefs.IsNotFound(err) {
				return fmt.Errorf("label blob %s: %w", d, err)
			}
		}
		others := map[string]content.Info{}
		for ns, info := range rows {
			if ns != f.layer.Namespace {
				others[ns] = info
			}
		}
		if err := share(ctx, f.c, others); err != nil {
			return err
		}
	}
	return nil
}
