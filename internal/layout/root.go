package layout

import (
	"fmt"
	"path/filepath"
	"strconv"
)

// Root is the directory below which everything of one snapshotter lies. Its
// methods compute paths; they read and change nothing.
type Root struct {
	// Path is absolute.
	Path string
	// Apart means that snapshots/ is a file system or a mount of its own. Then
	// removing/, healing/ and replaced/ lie in it, because rename(2) works within
	// one mount only.
	Apart bool
}

// Names of the directories into which trees are moved out of snapshots/. They lie
// in each of Root.Areas.
const (
	RemovingDir = "removing" // trees without a row, being deleted
	HealingDir  = "healing"  // layers being extracted again
	ReplacedDir = "replaced" // damaged trees that mounts may use
)

// Snapshots is the directory of the directories of snapshots.
func (r Root) Snapshots() string { return filepath.Join(r.Path, "snapshots") }

// Dir is the directory of a snapshot.
func (r Root) Dir(id uint64) string {
	return filepath.Join(r.Snapshots(), strconv.FormatUint(id, 10))
}

// Tree is the layer of a snapshot, or the writable part of a container.
func (r Root) Tree(id uint64) string {
	return filepath.Join(r.Path, "snapshots", strconv.FormatUint(id, 10), "fs") // often: one join
}

// Applied is where a layer is extracted before it becomes the Tree of its snapshot.
func (r Root) Applied(id uint64) string { return filepath.Join(r.Dir(id), "applied") }

// Removing is the directory of what is deleted from now on.
func (r Root) Removing() string { return filepath.Join(r.Areas()[0], RemovingDir) }

// Healing is the directory in which layers are extracted again.
func (r Root) Healing() string { return filepath.Join(r.Areas()[0], HealingDir) }

// HealingPlace is where a layer is extracted again. By the boot in its name, later
// starts know whether a mount can use what lies there: after the exchange, it is
// the damaged tree.
func (r Root) HealingPlace(id uint64, boot string) string {
	return filepath.Join(r.Healing(), fmt.Sprintf("%d.%s", id, boot))
}

// Replaced is the directory of the trees that healed layers have replaced.
func (r Root) Replaced() string { return filepath.Join(r.Areas()[0], ReplacedDir) }

// Empty is the lower directory of extractions without a parent.
func (r Root) Empty() string { return filepath.Join(r.Path, "empty") }

// SetAside is the directory of what a rebuild could not explain.
func (r Root) SetAside() string { return filepath.Join(r.Path, "set-aside") }

// Areas are the directories that hold removing/, healing/ and replaced/, the one
// in use first. The root is always one of them: what an earlier daemon has left
// there is deleted also when snapshots/ has become a mount since.
func (r Root) Areas() []string {
	if r.Apart {
		return []string{r.Snapshots(), r.Path}
	}
	return []string{r.Path}
}

// IsArea reports whether an entry of snapshots/ is one of the directories that
// lie there when snapshots/ is apart.
func (r Root) IsArea(name string) bool {
	return r.Apart && (name == RemovingDir || name == HealingDir || name == ReplacedDir)
}
