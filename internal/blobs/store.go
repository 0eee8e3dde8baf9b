package blobs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// The reasons why there is no blob for a layer. A caller may act on them in different
// ways: only ErrNotFound and ErrCorrupt mean that the blob is bad, see [Bad]. None is an
// error of containerd's errdefs: NotFound would mean to a gRPC client that the snapshot
// does not exist.
var (
	// ErrNoStore is returned when there is no content store at the path: nothing is
	// known of any blob.
	ErrNoStore = errors.New("no content store")
	// ErrCannot is returned when the blob, or what leads to it, cannot be read or
	// extracted here: it is encrypted or of an unknown media type, it cannot be
	// decompressed although its digest is right, or the system is short of file
	// descriptors or memory. Nothing is known to be wrong with the blob.
	ErrCannot = errors.New("cannot be extracted here")
	// ErrNotFound is returned when a store does not have the blob: no
	// manifest in it names the chain ID, or the file of the named blob is missing.
	ErrNotFound = errors.New("not in the content store")
	// ErrCorrupt is returned when the store has a blob of another size than its
	// descriptor, or with another digest than its name. For the latter the whole
	// blob was read.
	ErrCorrupt = errors.New("damaged in the content store")
	// ErrNotLayer is returned for a blob that is intact, and is not the layer that
	// a manifest claims it to be: what it holds has another diff ID, or is more
	// than the layer can be. Any client of containerd can store such a manifest.
	ErrNotLayer = errors.New("not a blob of this layer")
)

// Bad reports whether an error of Find or Try of a [Source] means that it
// has no good blob of a layer: every blob that could be one is missing or
// corrupt. It is false when anything could not be examined.
func Bad(err error) bool { return errors.Is(err, ErrNotFound) || errors.Is(err, ErrCorrupt) }

// Unusable reports whether an error means that a layer can be compared with, or
// extracted from, no blob, for whichever reason, and the caller itself did not fail.
func Unusable(err error) bool { return kindOf(err) != nil }

// kindOf returns which of the reasons above an error is, nil for none. The order
// matters: a blob of another layer may also be one that cannot be extracted.
func kindOf(err error) error {
	for _, kind := range []error{ErrNotLayer, ErrNoStore, ErrCannot, ErrCorrupt, ErrNotFound} {
		if errors.Is(err, kind) {
			return kind
		}
	}
	return nil
}

// problem is an error with a text of its own and one of the kinds above.
type problem struct {
	kind  error
	text  string
	cause error // nil when there is none
}

func (p *problem) Error() string {
	if p.cause != nil {
		return p.text + ": " + p.cause.Error()
	}
	return p.text
}

func (p *problem) Unwrap() []error {
	if p.cause != nil {
		return []error{p.kind, p.cause}
	}
	return []error{p.kind}
}

func notFound(format string, args ...any) error {
	return &problem{kind: ErrNotFound, text: fmt.Sprintf(format, args...)}
}

func corrupt(format string, args ...any) error {
	return &problem{kind: ErrCorrupt, text: fmt.Sprintf(format, args...)}
}

// cannot makes an error of kind ErrCannot out of one of the system, but for that
// of a context that has ended.
func cannot(cause error, format string, args ...any) error {
	text := fmt.Sprintf(format, args...)
	if errors.Is(cause, context.Canceled) || errors.Is(cause, context.DeadlineExceeded) {
		return fmt.Errorf("%s: %w", text, cause)
	}
	return &problem{ErrCannot, text, cause}
}

// Blob is a layer as it came from a registry: Descriptor has its media type,
// digest and size. DiffID is the digest of the tar in it. It follows from the
// chain ID: a manifest can lie about the blob of a layer, not about its diff ID.
type Blob struct {
	ocispec.Descriptor // without a digest where nothing names it: in archives of docker save
	DiffID             digest.Digest
	// Place is where it lies outside of the content store, for people; "" in the store.
	Place string

	origin Origin
	limit  int64 // bytes that the tar can have at most; 0: not known
}

// String names the blob in errors.
func (b Blob) String() string {
	if b.Place != "" {
		return b.Place
	}
	return "blob " + b.Digest.String()
}

// Layer is what is known of a layer that a blob is wanted for.
type Layer struct {
	ChainID string
	// Parent is the chain ID of the layer below; "" when there is none, or when it is not
	// known. DiffID is what a client has recorded, "" when it has not. Both only lead to
	// further blobs: a diff ID counts when the chain ID follows from it.
	Parent, DiffID string
	// Entries and Bytes are the size of its tree: names, and the sizes of its
	// regular files with hard links counted once. Both are 0 when not known.
	Entries, Bytes int64
}

// Bounds of a layer's tar, in bytes.
const (
	// perEntry is more than archive/tar accepts in front of an entry: one PAX
	// header and one long name or link target, each of 1 MiB at most
	// (maxSpecialFileSize), and the headers of all.
	perEntry = 3<<20 + 4<<10
	// duplicates is how often, on average, a tar may hold a file again.
	duplicates = 4
	// slack is for the end of the tar, and for entries that leave nothing in the
	// tree, such as files that the same tar removes again.
	slack = 64 << 20
)

// limit is how large the tar of a layer can be at most. It is generous on
// purpose: it ends the decompression of what is no layer of this size by orders of
// magnitude, and must never end that of the layer. 0 is no limit.
func (l Layer) limit() int64 {
	if l.Entries <= 0 || l.Bytes < 0 || l.Bytes > 1<<56 || l.Entries > 1<<36 {
		return 0
	}
	return slack + duplicates*l.Bytes + perEntry*l.Entries
}

// Is reports whether the diff ID of the layer is d: the chain ID follows from it and the
// chain ID below.
func (l Layer) Is(d digest.Digest) bool {
	chain := []digest.Digest{d}
	if l.Parent != "" {
		chain = []digest.Digest{digest.Digest(l.Parent), d}
	}
	return identity.ChainID(chain).String() == l.ChainID
}

// plausible reports whether a compressed blob is of a size to expect. Compression
// that fails makes a tar little larger; headers are 1 KiB with their padding.
func (l Layer) plausible(size int64) bool {
	return l.limit() == 0 || size <= 1<<20+l.Bytes+l.Bytes/8+2048*l.Entries
}

// Store is a content store on disk.
type Store struct {
	root string
	// busy holds a token while a caller uses the index. It is a channel so that
	// a caller who waits for it can give up.
	busy  chan struct{}
	index index

	mu     sync.Mutex // guards proven
	proven map[proof]proofResult
}

// Open returns the store in root, the directory that containerd calls
// io.containerd.content.v1.content. Nothing is read yet, and root need not
// exist. With an empty root there is no store.
func Open(root string) *Store {
	return &Store{root: root, busy: make(chan struct{}, 1), proven: map[proof]proofResult{}}
}

func (s *Store) dir() string { return filepath.Join(s.root, "blobs") }

func (s *Store) path(d digest.Digest) string {
	return filepath.Join(s.dir(), d.Algorithm().String(), d.Encoded())
}

// noStore is the error of a path without a content store.
func (s *Store) noStore(why string) error {
	if s.root == "" {
		return &problem{kind: ErrNoStore, text: "no content store is configured"}
	}
	return &problem{kind: ErrNoStore, text: fmt.Sprintf("there is no content store in %s (%s): set content_root to that of containerd", s.root, why)}
}

// Find returns the blobs that a layer can be extracted from, the most trusted
// first: present, of the right size, and of a kind that can be extracted. There
// are several when manifests name different ones, one compressed with gzip and
// one with zstd for example. When there is none, the error wraps one of the kinds
// of this package and contains the reasons; it is [Bad] only when every named blob is missing
// or corrupt.
func (s *Store) Find(ctx context.Context, want Layer) ([]Blob, error) {
	found, reasons, err := s.candidates(ctx, want)
	if err == nil && len(found) == 0 {
		err = verdict(want, reasons)
	}
	return found, err
}

// candidates are the named blobs of a layer that are usable as far as a lstat
// shows, and the reasons why others are not.
func (s *Store) candidates(ctx context.Context, want Layer) (found []Blob, reasons []error, err error) {
	if s.root == "" {
		return nil, nil, s.noStore("")
	}
	chain := digest.Digest(want.ChainID)
	if err := chain.Validate(); err != nil {
		if want.ChainID == "" {
			err = errors.New("it is not known")
		}
		return nil, nil, cannot(err, "no blob can be determined by the chain ID %q", want.ChainID)
	}
	own, others, err := s.named(ctx, want, time.Now())
	if err != nil {
		return nil, nil, err
	}
	times := map[digest.Digest]int{}
	for _, b := range slices.Concat(own, others) {
		if times[b.Digest]++; times[b.Digest] > 1 {
			continue
		}
		err := Extractable(b.MediaType)
		if err == nil {
			err = s.present(b.Descriptor)
		}
		if err != nil {
			reasons = append(reasons, fmt.Errorf("its blob %s %w", b.Digest, err))
			continue
		}
		b.origin, b.limit = s, want.limit()
		found = append(found, b)
	}
	order := func(b Blob) (int, int, int, int) {
		proven, implausible, other := 1, 1, 1
		if known, err := s.Remembered(b); known && err == nil {
			proven = 0
		}
		if want.plausible(b.Size) {
			implausible = 0
		}
		if slices.ContainsFunc(own, func(o Blob) bool { return o.Digest == b.Digest }) {
			other = 0
		}
		return proven, implausible, other, -times[b.Digest]
	}
	slices.SortStableFunc(found, func(a, b Blob) int {
		a1, a2, a3, a4 := order(a)
		b1, b2, b3, b4 := order(b)
		return cmp.Or(cmp.Compare(a1, b1), cmp.Compare(a2, b2), cmp.Compare(a3, b3), cmp.Compare(a4, b4), cmp.Compare(a.Size, b.Size))
	})
	return found, reasons, nil
}

// Try calls use with one blob of a layer after the other, the most trusted first,
// until a call returns nil; the blob is trusted more from then on. With several
// blobs, one that is not trusted yet is read and decompressed first, so that use
// is not called with what some manifest claims to be the layer and is not.
//
// A call that fails with one of the kinds of this package makes Try go on with the
// next blob; see [Blob.Blame] for how an error gets one. Any other error ends it
// and is returned as it is. After the last blob the error has the kind that
// describes all of them, as that of Find.
//
// When all of them are bad, the blobs that no manifest names are read and decompressed:
// the layer's manifest may be what is lost.
func (s *Store) Try(ctx context.Context, want Layer, use func(Blob) error) error {
	found, reasons, err := s.candidates(ctx, want)
	if err == nil {
		err = TryEach(ctx, want, found, reasons, len(found)+len(reasons) > 1, use)
	}
	if !Bad(err) || ctx.Err() != nil {
		return err
	}
	// What no manifest names is most likely no blob of this layer, which it shows when it is
	// decompressed. So an error of one is no reason.
	if uerr := TryEach(ctx, want, s.unnamed(want), nil, true, use); uerr == nil || kindOf(uerr) == nil {
		return uerr
	}
	return err
}

// unnamed returns blobs that no manifest names and that could be those of a layer, as far
// as their sizes show.
func (s *Store) unnamed(want Layer) (all []Blob) {
	s.busy <- struct{}{}
	defer func() { <-s.busy }()
	for _, b := range s.index.unnamed(want) {
		b.origin, b.limit = s, want.limit()
		all = append(all, b)
	}
	return all
}

// verdict is the error for a layer none of whose named blobs could be used.
func verdict(want Layer, reasons []error) error {
	text, kind := combine(reasons)
	return &problem{kind: kind, text: fmt.Sprintf("chain ID %s: %s", want.ChainID, text)}
}

// combine returns the text and the kind of several reasons together. Blobs of other
// layers do not count.
func combine(reasons []error) (text string, kind error) {
	kind = ErrNotFound
	var texts []string
	for _, r := range reasons {
		texts = append(texts, r.Error())
		switch is := kindOf(r); {
		case is == ErrNotLayer:
		case is == ErrNoStore, kind == ErrNoStore:
			kind = ErrNoStore
		case is == ErrCannot, kind == ErrCannot:
			kind = ErrCannot
		case is == ErrCorrupt:
			kind = ErrCorrupt
		}
	}
	return strings.Join(texts, "; "), kind
}

// named returns the blobs that manifests name for the chain ID of a layer, and those that
// they name for its diff ID anywhere else: at least one of either, or an error.
func (s *Store) named(ctx context.Context, want Layer, asked time.Time) (own, others []Blob, err error) {
	select {
	case s.busy <- struct{}{}:
		defer func() { <-s.busy }()
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
	chain := digest.Digest(want.ChainID)
	if !s.index.current() {
		if err := s.index.refresh(ctx, s.dir()); err != nil {
			return nil, nil, s.refreshError(chain, err)
		}
	}
	own, others = s.index.find(want)
	// What is missing may have been added without a change of a directory. One refresh
	// serves all callers that came before it began.
	if len(own) == 0 && s.index.read.Before(asked) {
		if err := s.index.refresh(ctx, s.dir()); err != nil {
			return nil, nil, s.refreshError(chain, err)
		}
		own, others = s.index.find(want)
	}
	if len(own)+len(others) > 0 {
		return own, others, nil
	}
	text := fmt.Sprintf("no manifest in %s names chain ID %s", s.dir(), chain)
	if over := s.index.over; len(over) > 0 {
		text += fmt.Sprintf("; skipped: %s", strings.Join(over[:min(3, len(over))], "; "))
		if len(over) > 3 {
			text += fmt.Sprintf("; and %d more", len(over)-3)
		}
	}
	if s.index.unread {
		// One that cannot be read now may name it.
		return nil, nil, &problem{kind: ErrCannot, text: text}
	}
	return nil, nil, notFound("%s", text)
}

func (s *Store) refreshError(chain digest.Digest, err error) error {
	var none errNotStore
	if errors.As(err, &none) {
		return s.noStore(string(none))
	}
	return cannot(err, "look up chain ID %s", chain)
}

// present returns the reason why the file of a blob cannot be the blob, as far as that is
// known without reading it.
func (s *Store) present(desc ocispec.Descriptor) error {
	info, err := os.Stat(s.path(desc.Digest))
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		// The file system of the store may have been unmounted meanwhile.
		if _, err := os.ReadDir(filepath.Dir(s.path(desc.Digest))); err != nil {
			return s.noStore(err.Error())
		}
		if images.IsNonDistributable(desc.MediaType) {
			return notFound("is missing: it is a foreign layer, which registries need not have")
		}
		return notFound("is missing")
	case err != nil:
		return cannot(err, "cannot be examined")
	case !info.Mode().IsRegular():
		return corrupt("is not a file")
	case info.Size() != desc.Size:
		return corrupt("has %d bytes, %d expected", info.Size(), desc.Size)
	}
	return nil
}

// Extractable returns why layers of a media type cannot be extracted, with
// ErrCannot.
func Extractable(mediaType string) error {
	base, suffix, _ := strings.Cut(mediaType, "+")
	if slices.Contains(strings.Split(suffix, "+"), "encrypted") {
		return &problem{kind: ErrCannot, text: fmt.Sprintf("is encrypted (%s)", mediaType)}
	}
	known := suffix == "" || suffix == "gzip" || suffix == "zstd"
	// What the suffix promises does not matter: the first bytes of a blob decide.
	if _, err := images.DiffCompression(context.Background(), base); err != nil || !known {
		return &problem{kind: ErrCannot, text: fmt.Sprintf("is not a tar (%s)", mediaType)}
	}
	return nil
}
