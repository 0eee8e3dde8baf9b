// Package doctor examines a node for what keeps this snapshotter from being used, or its
// promise from being kept: kernel, disk, sockets, the service, what containerd runs with and
// what its files will make of it, images, containers. It changes nothing.
//
// [Gather] takes the facts, once. Each check of [Checks] judges by them alone; what could not
// be determined is no failure.
package doctor

import (
	"cmp"
	"slices"
)

// Level is how bad a finding is.
type Level string

const (
	// OK is for what is as it should be, and for what cannot be determined.
	OK Level = "ok"
	// Warning is for what weakens the promise, or will be a failure later.
	Warning Level = "warning"
	// Failure is for what keeps the snapshotter from being used, or breaks the promise.
	Failure Level = "failure"
)

// Finding is what a check has found.
type Finding struct {
	Check string `json:"check"`
	Level Level  `json:"level"`
	Text  string `json:"text"`
	Cure  string `json:"cure,omitempty"` // never of OK
}

// Check is one of the things that are examined.
type Check struct {
	Name  string
	Finds string // what it finds, for the documentation
	Cure  string // of what it finds, unless the finding itself has another one
	judge func(*Facts) []Finding
}

// Checks are all checks, in the order of the layers of a node.
var Checks = []Check{
	{"kernel", "Linux older than 5.17, which does not report every error of a sync; no overlayfs", "run Linux 5.17 or newer", kernel},
	{"filesystem", "a root on overlay, tmpfs, FUSE, NFS, or a file system without a crash test", "set root to a directory on a local ext4, xfs or btrfs", filesystem},
	{"journal", "ext4 without a journal; data=writeback; nobarrier", "tune2fs -O has_journal on the unmounted device; mount it with data=ordered,barrier=1", journal},
	{"disk", "a removable disk, or an SD card: many acknowledge a flush that they have not done", "use a disk that keeps what it has acknowledged, such as an SSD with power loss protection", disk},
	{"sync", "a sync of the root that fails, or takes longer than 5 s: containerd waits for it in every Commit", "give the images a disk of their own, or find what writes so much", syncing},
	{"neighbors", "etcd, or another database, on the file system of the root: each Commit syncs its data, too", "give the images a file system of their own", neighbors},
	{"space", "less than 15 % of the bytes, or 5 % of the inodes, free: the kubelet removes images", "remove images, or enlarge the file system", space},
	{"sockets", "no answer; a mode other than 0600; a file in the place; a daemon with another root", "systemctl start durable-snapshotter; its log has the reason of a refused start", sockets},
	{"unit", "a unit that is not enabled, is required by containerd, hangs on containerd only, or is not ordered before the node's containerd", "systemctl enable durable-snapshotter; install the unit of the package", unit},
	{"shutdown", "damaged or unverified layers; mending that is stopped; an image check that is due; an unclean shutdown", "durable-snapshotter check, then durable-snapshotter repair --apply", shutdown},
	{"clock", "a clock before the latest entry of the journal, as on a machine without a battery", "set the clock before the daemon starts (chrony, fake-hwclock)", clock},
	{"selinux", "a label of the root that containers cannot read", "semanage fcontext -a -t container_ro_file_t '/var/lib/durable-snapshotter(/.*)?'; restorecon -R /var/lib/durable-snapshotter", selinux},
	{"plugin", "a running containerd without this snapshotter, or with another export or other capabilities than its release takes", "durable-snapshotter doctor --print-config PLATFORM prints what to add; then restart containerd", plugin},
	{"containerd-config", "files with which containerd would not start again: a table twice, a syntax error; a type = \"diff\" proxy plugin on 1.6", "remove what the message names before containerd is restarted", parses},
	{"cri-snapshotter", "pods on another snapshotter, and why: not restarted, version 2 without runtimes, a drop-in that is not imported or of the wrong version, the wrong table, a runtime's own", "durable-snapshotter doctor --print-config PLATFORM prints what to add; docs/containerd.md has the pairings", criSnapshotter},
	{"unpack-config", "a list of the transfer service without this snapshotter, without one that is in use, or with a name that is not registered", "add an entry for each snapshotter, with differ = \"walking\" and, from 2.3 on, optional = true", unpackConfig},
	{"sync-knobs", "sync_fs and image_pull_with_sync_fs: harmless, without an effect on layers here", "none is needed", syncKnobs},
	{"discarded-blobs", "discard_unpacked_layers: layers can neither be healed nor moved", "set discard_unpacked_layers = false, restart containerd and pull the images again", discards},
	{"versions", "releases with known defects", "upgrade containerd", versions},
	{"content-root", "a content_root that does not exist, or is not the running containerd's", "set content_root in /etc/durable-snapshotter/config.toml, and restart the daemon", contentRoot},
	{"pinned-images", "a pause image, or another pinned one, that is not ready here, or without its blobs", "durable-snapshotter migrate; or import or pull the image again", pinnedImages},
	{"images", "images that are not ready, or that only another snapshotter has", "durable-snapshotter repair --images --apply; for those of another snapshotter durable-snapshotter migrate", allImages},
	{"containers", "containers that stand on another snapshotter", "drain the node, or let them end: containers that are created from now on use this one", containers},
	{"orphans", "snapshots that containerd does not know", "durable-snapshotter repair --orphans --apply", orphaned},
}

// Run judges the facts by all checks, and returns at least one finding of each, the worst first.
func Run(f *Facts) []Finding {
	found := []Finding{}
	for _, c := range Checks {
		for _, one := range c.judge(f) {
			one.Check = c.Name
			if one.Level != OK {
				one.Cure = cmp.Or(one.Cure, c.Cure)
			}
			found = append(found, one)
		}
	}
	Sort(found)
	return found
}

// Sort brings the worst to the front.
func Sort(found []Finding) {
	slices.SortStableFunc(found, func(a, b Finding) int { return rank(b.Level) - rank(a.Level) })
}

func rank(l Level) int { return slices.Index([]Level{OK, Warning, Failure}, l) }

// Worst is the level of the worst finding.
func Worst(found []Finding) Level {
	worst := OK
	for _, f := range found {
		if rank(f.Level) > rank(worst) {
			worst = f.Level
		}
	}
	return worst
}

func ok(text string) []Finding { return []Finding{{Level: OK, Text: text}} }

// unknown is for what cannot be determined, and need not be.
func unknown(why string) []Finding { return ok("not known: " + why) }

func warn(text, cure string) []Finding { return []Finding{{Level: Warning, Text: text, Cure: cure}} }

func fail(text, cure string) []Finding { return []Finding{{Level: Failure, Text: text, Cure: cure}} }

// orOK is for when nothing was found.
func orOK(found []Finding, text string) []Finding {
	if len(found) == 0 {
		return ok(text)
	}
	return found
}
