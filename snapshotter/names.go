package snapshotter

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// maxName bounds keys and names, in bytes. containerd's own are below 400
// (namespace, number, name); bbolt's limit is 32,768.
const maxName = 2048

// checkName refuses what can be no key of containerd's, and what would be
// trouble to print or to use in a path one day.
func checkName(what, name string) error {
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

// Labels that containerd 2.3 and newer send with the Prepare and Commit of an
// extraction (core/unpack/unpacker.go:487).
const (
	labelTarget        = "containerd.io/snapshot.ref"
	labelDiffID        = "containerd.io/snapshot/diff-id"
	labelParentChainID = "containerd.io/snapshot/parent-chain-id"
)

// splitName takes containerd's backend name "<namespace>/<number>/<name>"
// (core/metadata/snapshot.go:61) apart. Names of other clients have no
// namespace.
func splitName(name string) (namespace, rest string) {
	parts := strings.SplitN(name, "/", 3)
	if len(parts) < 3 {
		return "", name
	}
	return parts[0], parts[2]
}

// chainIDOf returns the chain ID that a committed name or a label tells of.
// Labels may be missing: Image.Unpack sends none (pkg/rootfs/apply.go:124).
func chainIDOf(name string, labels map[string]string) string {
	if ref := labels[labelTarget]; ref != "" {
		return ref
	}
	if _, rest := splitName(name); isDigest(rest) {
		return rest
	}
	return ""
}

// identified completes a journal entry from its name: what was there before the
// journal has neither chain ID nor namespace in its entry.
func identified(e storage.CommitEntry) storage.CommitEntry {
	namespace, _ := splitName(e.Name)
	e.ChainID, e.Namespace = cmp.Or(e.ChainID, chainIDOf(e.Name, nil)), cmp.Or(e.Namespace, namespace)
	return e
}

// extractionOf reports whether an active snapshot is a layer being unpacked, and
// of which chain ID. The key of an extraction is "extract-<unique> <chain ID>"
// (snapshots.UnpackKeyFormat).
func extractionOf(key string, labels map[string]string) (chainID string, ok bool) {
	_, rest := splitName(key)
	if unique, id, found := strings.Cut(rest, " "); found && strings.HasPrefix(unique, snapshots.UnpackKeyPrefix+"-") && isDigest(id) {
		return id, true
	}
	ref := labels[labelTarget]
	return ref, ref != ""
}

func isDigest(s string) bool {
	algorithm, hex, ok := strings.Cut(s, ":")
	return ok && algorithm != "" && len(hex) >= 32 && strings.Trim(hex, "0123456789abcdef") == ""
}
