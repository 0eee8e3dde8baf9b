package layout

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/errdefs"
)

// maxName bounds keys and names, in bytes. containerd's own are below 400
// (namespace, number, name); bbolt's limit is 32,768.
const maxName = 2048

// CheckName returns InvalidArgument for a name that cannot be a key of containerd's,
// or that is not safe to print or to use in a path: an empty one, one longer than
// 2,048 bytes, and one with a NUL byte or the path element "..". The error begins
// with what.
func CheckName(what, name string) error {
	switch {
	case name == "":
		return fmt.Errorf("%s is empty: %w", what, errdefs.ErrInvalidArgument)
	case len(name) > maxName:
		return fmt.Errorf("%s of %d bytes, %q…: longer than %d: %w", what, len(name), name[:32], maxName, errdefs.ErrInvalidArgument)
	case strings.ContainsRune(name, 0):
		return fmt.Errorf("%s %q: contains a NUL byte: %w", what, name, errdefs.ErrInvalidArgument)
	case slices.Contains(strings.Split(name, "/"), ".."):
		return fmt.Errorf("%s %q: contains the path element \"..\": %w", what, name, errdefs.ErrInvalidArgument)
	}
	return nil
}

// maxLabels bounds how many labels a snapshot has. containerd's own are fewer than twenty.
const maxLabels = 1024

// CheckLabels returns InvalidArgument for more than 1,024 labels, and for one whose key and value
// are longer than containerd allows, 4,096 bytes: it would be in every answer about the snapshot.
func CheckLabels(all map[string]string) error {
	if len(all) > maxLabels {
		return fmt.Errorf("%d labels: more than %d: %w", len(all), maxLabels, errdefs.ErrInvalidArgument)
	}
	for key, value := range all {
		if err := labels.Validate(key, value); err != nil {
			return err
		}
	}
	return nil
}

// OwnLabels begins the labels that Stat adds and that are not stored.
const OwnLabels = "durable-snapshotter/"

// WithoutOwn takes them out, of a client that changes labels by writing back what it was given.
func WithoutOwn(labels map[string]string) map[string]string {
	labels = maps.Clone(labels)
	maps.DeleteFunc(labels, func(k, _ string) bool { return strings.HasPrefix(k, OwnLabels) })
	return labels
}

// Labels that containerd 2.3 and newer send with the Prepare and Commit of an
// extraction (core/unpack/unpacker.go:487).
const (
	LabelTarget        = "containerd.io/snapshot.ref"             // the name that Commit will give it
	LabelDiffID        = "containerd.io/snapshot/diff-id"         // digest of its tar
	LabelParentChainID = "containerd.io/snapshot/parent-chain-id" // its parent, which becomes known at Commit
)

// SplitName splits containerd's backend name "<namespace>/<number>/<name>"
// (core/metadata/snapshot.go:61). For names of other clients, which have no
// namespace, rest is the whole name.
func SplitName(name string) (namespace, rest string) {
	parts := strings.SplitN(name, "/", 3)
	if len(parts) < 3 {
		return "", name
	}
	return parts[0], parts[2]
}

// buildkitPrefix begins the names of layers that BuildKit has extracted from blobs:
// "buildkit-layer-snapshot-v1-<algorithm>-<hex of the chain ID>" (moby/buildkit
// v0.34.2, snapshot/snapshotid.go:12). Older versions use the chain ID itself.
const buildkitPrefix = "buildkit-layer-snapshot-v1-"

// namedChainID returns the chain ID that a name, without namespace and number,
// stands for by construction:
//
//   - a digest: containerd's unpackers, the CRI plugin and so k3s, nerdctl, moby;
//   - BuildKit's own names.
//
// There is one other digest: client.WithUserNSRemappedSnapshot commits a layer with
// shifted owners under the digest of its parent and the mapping
// (client/snapshotter_opts_unix.go:138). No tar has that digest, and no config a diff
// ID that leads to it, so no blob is ever found for it; like any layer without a blob
// its key can be dropped, and the client makes it again.
//
// Other names identify no layer: moby's "<container>-init", BuildKit's random names of build
// steps, what a client commits by hand.
func namedChainID(name string) string {
	if IsDigest(name) {
		return name
	}
	if rest, ok := strings.CutPrefix(name, buildkitPrefix); ok {
		if algorithm, hex, ok := strings.Cut(rest, "-"); ok && IsDigest(algorithm+":"+hex) {
			return algorithm + ":" + hex
		}
	}
	return ""
}

// ChainIDOf returns the chain ID that a committed name stands for, "" when it stands
// for none, or when the label of the extraction names another. The label alone is no
// proof: clients pass labels on from anywhere, the CRI plugin from the annotations of
// pods (internal/cri/server/podsandbox/sandbox_run.go:193).
func ChainIDOf(name string, labels map[string]string) string {
	_, rest := SplitName(name)
	id := namedChainID(rest)
	if ref := labels[LabelTarget]; ref != "" && namedChainID(ref) != id {
		return ""
	}
	return id
}

// ExtractionOf reports whether an active snapshot is a layer being unpacked, and
// of which chain ID. The key of an extraction is "extract-<unique> <chain ID>"
// (snapshots.UnpackKeyFormat), also BuildKit's (cache/refs.go:1417), and for moby's
// docker commit "extract-<unique>-<chain ID>" (daemon/containerd/image_commit.go:261).
func ExtractionOf(key string, labels map[string]string) (chainID string, ok bool) {
	_, rest := SplitName(key)
	if after, found := strings.CutPrefix(rest, snapshots.UnpackKeyPrefix+"-"); found {
		if i := strings.LastIndexAny(after, " -"); i > 0 && IsDigest(after[i+1:]) {
			return after[i+1:], true
		}
	}
	ref := labels[LabelTarget]
	return namedChainID(ref), ref != ""
}

// IsDigest reports whether s has the form "<algorithm>:<hex>", with 32 lower-case
// hexadecimal digits or more.
func IsDigest(s string) bool {
	algorithm, hex, ok := strings.Cut(s, ":")
	return ok && algorithm != "" && len(hex) >= 32 && strings.Trim(hex, "0123456789abcdef") == ""
}
