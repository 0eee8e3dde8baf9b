package pulls

import (
	"fmt"
	"os/exec"
	"slices"
	"strings"

	"github.com/durable-snapshotter/durable-snapshotter/internal/inflate"
)

// Variant is a way to pull.
type Variant struct {
	Name        string
	snapshotter string
	differ      bool // the daemon extracts the layers
	daemon      bool
	base        bool // the daemon is that of the base revision
	local       bool // ctr fetches and unpacks, and layers are synced: the transfer service cannot sync
	fetches     bool // ctr fetches, and nothing is unpacked
}

// baseSuffix ends the names of variants whose daemon is of the base revision.
const baseSuffix = "@base"

// Variants are all of them, in the order of tables.
//
//   - overlayfs: as containerd is installed; nothing is synced.
//   - overlayfs-sync: the same, with ctr image pull --local --sync-fs. It unpacks when everything is
//     fetched, and one layer after another.
//   - erofs: containerd's snapshotter and differ of this name; nothing is synced.
//   - durable: containerd extracts, the daemon syncs in Commit.
//   - durable-differ: the daemon extracts and syncs.
//   - fetch: ctr content fetch. Nothing is unpacked: no snapshotter makes this part of a pull faster.
var Variants = []Variant{
	{Name: baseline, snapshotter: "overlayfs"},
	{Name: "overlayfs-sync", snapshotter: "overlayfs", local: true},
	{Name: "erofs", snapshotter: "erofs"},
	{Name: "durable", snapshotter: "durable", daemon: true},
	{Name: "durable-differ", snapshotter: "durable", daemon: true, differ: true},
	{Name: "fetch", snapshotter: "overlayfs", fetches: true},
}

// place is a variant's in Variants.
func place(name string) int {
	return slices.IndexFunc(Variants, func(v Variant) bool { return v.Name == strings.TrimSuffix(name, baseSuffix) })
}

// can reports whether a variant can pull with a setting, and whether the setting makes a
// difference.
func (v Variant) can(s Setting) bool { return !v.local && !v.fetches || s.Unpacks == 1 }

// choose returns the variants of the names, without those that are not possible here, and why
// they are left out.
func choose(names []string) (chosen []Variant, leftOut []string, err error) {
	for _, name := range names {
		i := slices.IndexFunc(Variants, func(v Variant) bool { return v.Name == name })
		if i < 0 {
			return nil, nil, fmt.Errorf("there is no variant %q", name)
		}
		if name == "erofs" {
			if why := noErofs(); why != "" {
				leftOut = append(leftOut, "erofs: "+why)
				continue
			}
		}
		chosen = append(chosen, Variants[i])
	}
	return chosen, leftOut, nil
}

// noErofs is why containerd's differ for erofs does not work here, or empty.
func noErofs() string {
	out, err := exec.Command("mkfs.erofs", "--help").CombinedOutput()
	switch {
	case err != nil:
		return fmt.Sprintf("mkfs.erofs, of the Debian package erofs-utils, does not run: %v", err)
	case !strings.Contains(string(out), "--tar="): // what containerd requires
		return "this mkfs.erofs cannot read tars: containerd's differ needs erofs-utils 1.7 or newer (Debian 13)"
	}
	return ""
}

// noIgzip is why pulls with igzip are left out, or empty.
func noIgzip() string {
	if inflate.Igzip() == "" {
		return "igzip is not on PATH: install the Debian package isal"
	}
	return ""
}
