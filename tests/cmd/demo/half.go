package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// note is what a container syncs to disk before the cut.
const note = "written before the power cut"

// half is one of the two machines: a disk, a containerd and, for durable, the
// daemon. Its name is that of the snapshotter.
type half struct {
	name   string
	bins   kit.Binaries
	disk   *kit.Disk
	daemon *kit.Daemon
	cd     *kit.Containerd
	before kit.Tree // the layers after the pull
	seen   observation
}

// runDir is the machine's /run, which a power cut empties, with /etc and the
// logs. It is not on the disk, because logs are wanted afterwards.
func (h *half) runDir() string { return filepath.Join(os.TempDir(), h.name, "run") }

func (h *half) makeDisk(bins kit.Binaries) (err error) {
	h.bins = bins
	h.disk, err = kit.NewDisk(filepath.Join(os.TempDir(), h.name), kit.DiskOptions{FS: "ext4", Size: 2 << 30})
	if err == nil {
		detail("%-9s %s", h.name, h.disk.Device())
	}
	return err
}

// boot starts what runs on the machine, the first time and again.
func (h *half) boot(ctx context.Context) (err error) {
	if h.name == "durable" {
		if h.daemon == nil {
			h.daemon, err = kit.NewDaemon(kit.DaemonOptions{
				Binary: h.bins.Daemon,
				Dir:    h.disk.Path("durable-snapshotter"),
				RunDir: filepath.Join(h.runDir(), "durable-snapshotter"),
				// What layers are healed from.
				ContentRoot: filepath.Join(h.disk.Path("containerd"), "root", "io.containerd.content.v1.content"),
			})
			if err != nil {
				return err
			}
		}
		if err := h.daemon.Start(ctx); err != nil {
			return err
		}
	}
	if h.cd != nil {
		return h.cd.Start(ctx)
	}
	h.cd, err = kit.StartContainerd(ctx, kit.ContainerdOptions{
		Binaries: h.bins,
		Dir:      h.disk.Path("containerd"),
		RunDir:   filepath.Join(h.runDir(), "containerd"),
		Daemon:   h.daemon,
	})
	return err
}

func (h *half) pull(ctx context.Context, ref string) (err error) {
	if _, err := h.ctr(ctx, "image", "pull", "--plain-http", "--snapshotter", h.name, ref); err != nil {
		return err
	}
	h.before, err = h.layers()
	return err
}

func (h *half) runContainer(ctx context.Context, ref string) error {
	id := "app-" + h.name
	if _, err := h.ctr(ctx, "run", "--detach", "--null-io", "--snapshotter", h.name, ref, id, "/bin/guest", "wait"); err != nil {
		return err
	}
	if _, err := h.ctr(ctx, "task", "exec", "--exec-id", "note", id, "/bin/guest", "write", "/note", note); err != nil {
		return err
	}
	return nil
}

// snapshotsDir is where the snapshotter keeps the layers.
func (h *half) snapshotsDir() string {
	if h.daemon != nil {
		return filepath.Join(h.daemon.Root, "snapshots")
	}
	return filepath.Join(h.cd.Root, "io.containerd.snapshotter.v1.overlayfs", "snapshots")
}

// layers are the files of all snapshots, without what a snapshotter keeps
// beside them. A directory that is gone has none.
func (h *half) layers() (kit.Tree, error) {
	all, err := kit.Fingerprint(h.snapshotsDir())
	if errors.Is(err, os.ErrNotExist) {
		return kit.Tree{}, nil
	}
	if err != nil {
		return nil, err
	}
	files := kit.Tree{}
	for path, node := range all {
		_, inside, _ := strings.Cut(path, "/")
		if strings.HasPrefix(inside, "fs/") && node.Mode.IsRegular() {
			files[path] = node
		}
	}
	return files, nil
}

// powerOn mounts the disk, which replays its journal, and compares the layers
// before anything that could change them runs.
func (h *half) powerOn(ctx context.Context) error {
	if err := kit.EmptyRun(h.runDir()); err != nil {
		return err
	}
	if err := h.disk.Unmount(); err != nil {
		return err
	}
	if err := h.disk.Mount(); err != nil {
		return err
	}
	after, err := h.layers()
	if err != nil {
		return err
	}
	h.seen.count(h.before, after)
	notes, err := filepath.Glob(filepath.Join(h.snapshotsDir(), "*", "fs", "note"))
	if err != nil {
		return err
	}
	for _, name := range notes {
		text, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		h.seen.note = h.seen.note || string(text) == note
	}
	detail("%-9s of %d files in the layers %d are whole, %d empty, %d gone", h.name, h.seen.files, h.seen.whole, h.seen.empty, h.seen.gone)
	return h.boot(ctx)
}

// checked is a line of "ctr image check": name, type, digest, status, size, unpacked.
var checked = regexp.MustCompile(`(?m)^(\S+)\s+\S+\s+sha256:\S+\s+(\w+ \(\S+\)).*\s(true|false)\s*$`)

// observe queries containerd about the image and then uses it.
func (h *half) observe(ctx context.Context, ref string) error {
	out, err := h.ctr(ctx, "image", "check", "--snapshotter", h.name)
	if err != nil {
		return err
	}
	m := checked.FindStringSubmatch(out)
	if m == nil || m[1] != ref {
		return fmt.Errorf("ctr image check: no line for %s in %q", ref, out)
	}
	h.seen.status, h.seen.unpacked = m[2], m[3]
	result("%s, unpacked %s", h.seen.status, h.seen.unpacked)

	h.seen.run = h.try(ctx, ref, "first")
	if _, err := h.ctr(ctx, "image", "pull", "--plain-http", "--snapshotter", h.name, ref); err != nil {
		result("%v", err)
		h.seen.again = outcome{text: "the pull fails: " + cause(err)}
		return ctx.Err()
	}
	h.seen.again = h.try(ctx, ref, "second")
	return ctx.Err()
}

// deleteLayers removes what the snapshotter keeps of layers, as a failing disk
// or an administrator may, and runs a container without a pull.
func (h *half) deleteLayers(ctx context.Context, ref string) error {
	fmt.Printf("     %-9s $ rm -rf %s/*\n", h.name, h.snapshotsDir())
	all, err := filepath.Glob(filepath.Join(h.snapshotsDir(), "*"))
	if err != nil {
		return err
	}
	for _, dir := range all {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	h.seen.deleted = h.try(ctx, ref, "third")
	return ctx.Err()
}

// try runs a container that prints one line.
func (h *half) try(ctx context.Context, ref, id string) outcome {
	const greeting = "alive"
	out, err := h.ctr(ctx, "run", "--rm", "--snapshotter", h.name, ref, id+"-"+h.name, "/bin/guest", "echo", greeting)
	out = strings.TrimSpace(out)
	switch {
	case err != nil:
		result("%s", lastLine(err))
		return outcome{text: "fails: " + cause(err)}
	case out != greeting:
		result("%q", out)
		return outcome{text: fmt.Sprintf("prints %q", out)}
	}
	result("%s", out)
	return outcome{ok: true, text: fmt.Sprintf("runs, prints %q", out)}
}

// ctr shows a command and runs it.
func (h *half) ctr(ctx context.Context, args ...string) (string, error) {
	shown := make([]string, len(args))
	for i, arg := range args {
		if shown[i] = arg; strings.Contains(arg, " ") {
			shown[i] = "'" + arg + "'"
		}
	}
	fmt.Printf("     %-9s $ ctr %s\n", h.name, strings.Join(shown, " "))
	return h.cd.Ctr(ctx, args...)
}

func (h *half) dumpLogs() {
	const enough = 6000
	if h.daemon != nil && h.daemon.Process != nil {
		fmt.Printf("\n%s: %s\n", h.name, h.daemon.LogTail(enough))
	}
	if h.cd != nil && h.cd.Process != nil {
		fmt.Printf("\n%s: %s\n", h.name, h.cd.LogTail(enough))
	}
}
