// Command demo shows on one machine, in under a minute, what this project is
// for. Two halves get a scratch disk and a containerd each; one unpacks an image
// with the built-in overlayfs snapshotter, the other with durable-snapshotter.
// Both run a container, both lose their power at the same moment, both boot.
// Then it deletes the layers of both, and puts side by side what containerd reports of
// the image and what is there.
//
// Nothing is staged: containerd, ctr and runc are the released ones, the disks
// are ext4 with a journal and default mount options, and the power cut is ext4's
// own FS_IOC_SHUTDOWN, after which the kernel writes nothing more.
//
// The loss under overlayfs does not depend on luck, for three reasons. The
// container writes a note and fsyncs it, as a database would: that commits the
// whole journal of ext4, so every name and every row of containerd's databases
// is on the disk, while the content of the layers still waits in memory for the
// kernel's writeback (30 s by default, see vm.dirty_expire_centisecs). The power
// goes right after. And the halves do not share a disk, because the syncfs of
// one would save the layers of the other; nor do containers end before the cut,
// because unmounting an overlay syncs the file system below it.
package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

const usage = `usage: go run ./cmd/demo        (in tests/, as root)

Unpacks one image with overlayfs and with durable-snapshotter on scratch disks,
cuts the power of both and shows what is left. Takes no arguments.

exit status: 0 both halves came out as expected, 1 one did not, 2 wrong usage
`

func main() {
	if len(os.Args) > 1 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	if !kit.Inside() {
		// "go run" dies of SIGTERM without passing it on. Request it ourselves,
		// otherwise the demonstration would go on behind a finished command.
		if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGTERM), 0, 0, 0); err != nil {
			fmt.Fprintln(os.Stderr, "demo: set the parent death signal:", err)
			os.Exit(1)
		}
	}
	os.Exit(kit.Main(run))
}

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	halves := []*half{{name: "overlayfs"}, {name: "durable"}}
	err := demonstrate(ctx, halves[0], halves[1])
	interrupted := ctx.Err() != nil
	if err != nil && !interrupted {
		for _, h := range halves {
			h.dumpLogs()
		}
	}
	cleared := clearAway(halves)
	switch {
	case interrupted && cleared == nil:
		fmt.Println("demo: interrupted")
		return 130
	case interrupted:
		err = cleared
	default:
		err = errors.Join(err, cleared)
	}
	if err != nil {
		fmt.Println("demo: FAILED:", err)
		return 1
	}
	fmt.Println("demo: ok")
	return 0
}

// demonstrate is the whole story, one step after the other.
func demonstrate(ctx context.Context, overlayfs, durable *half) (err error) {
	start := time.Now()
	if err := haveTools(); err != nil {
		return err
	}
	fmt.Print("The same image, the same power cut, two snapshotters.\n\n")

	step(1, "build containerd, ctr, the runc shim and durable-snapshotter (minutes the first time)")
	bins, err := kit.Build(ctx)
	if err != nil {
		return err
	}
	image, err := demoImage(ctx, bins)
	if err != nil {
		return err
	}
	built := time.Now()
	ctx, cancel := context.WithTimeout(ctx, 4*time.Minute)
	defer cancel()

	step(2, "make a scratch disk for each half: ext4 with a journal, default mount options")
	halves := []*half{overlayfs, durable}
	for _, h := range halves {
		if err := h.makeDisk(bins); err != nil {
			return err
		}
	}
	registry, err := kit.StartRegistry(os.TempDir() + "/registry")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, registry.Close()) }()
	pushed, err := kit.Push(ctx, registry, "demo", image)
	if err != nil {
		return err
	}

	step(3, "start a containerd on each disk, and durable-snapshotter beside the second")
	detail("(from here on ctr is shown without its --address and --namespace)")
	for _, h := range halves {
		if err := h.boot(ctx); err != nil {
			return err
		}
	}

	// overlayfs comes second, so that its layers are the fresher ones: the time
	// in which the kernel could write them by itself is the shorter.
	step(4, fmt.Sprintf("pull the image (%d layers, %d MiB) with each", len(pushed.Layers), pushed.Bytes>>20))
	order := []*half{durable, overlayfs}
	var pulled time.Time
	for _, h := range order {
		pulled = time.Now()
		if err := h.pull(ctx, pushed.Ref); err != nil {
			return err
		}
	}

	step(5, "run a container from each; it stays up, and writes a note that it syncs to disk")
	for _, h := range order {
		if err := h.runContainer(ctx, pushed.Ref); err != nil {
			return err
		}
	}

	step(6, "cut the power of both, in the middle of the work")
	killed, err := cutPower(halves)
	if err != nil {
		return err
	}
	dirty := time.Since(pulled)
	detail("the disks take no more writes (FS_IOC_SHUTDOWN, journal not flushed); %d processes got SIGKILL", killed)
	detail("%.1f s after the pull with overlayfs began", dirty.Seconds())

	step(7, "power returns: mount the disks, compare the layers, start the daemons again")
	for _, h := range halves {
		if err := h.powerOn(ctx); err != nil {
			return err
		}
	}

	step(8, "query containerd, and then try")
	for _, h := range halves {
		if err := h.observe(ctx, pushed.Ref); err != nil {
			return err
		}
	}

	step(9, "delete all layers by hand, and run a container without a pull")
	for _, h := range halves {
		if err := h.deleteLayers(ctx, pushed.Ref); err != nil {
			return err
		}
	}

	fmt.Println()
	printTable(os.Stdout, overlayfs.seen, durable.seen)
	fmt.Println()
	if err := verdict(overlayfs.seen, durable.seen, dirty); err != nil {
		return err
	}
	fmt.Printf("Both containerds report the image as whole. After the power cut it is so only under durable-snapshotter;\n"+
		"under overlayfs it is broken, and pulling again does not mend it. Layers that are deleted afterwards durable-snapshotter\n"+
		"extracts again, out of the blobs that containerd has, before the container starts. (%.1f s, %.1f s of them building)\n",
		time.Since(start).Seconds(), built.Sub(start).Seconds())
	return nil
}

// haveTools searches for what Debian must have installed, so that a newcomer reads
// the name of a package and not of a failed system call.
func haveTools() error {
	for tool, pkg := range map[string]string{"runc": "runc", "mkfs.ext4": "e2fsprogs", "mount": "mount", "go": "golang"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%w (Debian package %s)", err, pkg)
		}
	}
	return nil
}

// demoImage is the image of the end-to-end tests with one more layer of some
// hundred files, so that "how much is left" has an answer between all and none.
// The program is in that layer too: what is unpacked last is the youngest at the
// cut, and the least likely to be on the disk by chance.
func demoImage(ctx context.Context, bins kit.Binaries) (kit.Image, error) {
	image, err := kit.Runnable(ctx)
	if err != nil {
		return kit.Image{}, err
	}
	guest, err := kit.FileFrom("bin/guest", 0o755, filepath.Join(bins.Dir, "guest"))
	if err != nil {
		return kit.Image{}, err
	}
	entries := []kit.Entry{kit.Dir("data", 0o755)}
	noise := rand.New(rand.NewPCG(5854, 1))
	for i := range 200 {
		body := make([]byte, 64<<10)
		for j := range body {
			body[j] = byte(noise.Uint32())
		}
		entries = append(entries, kit.File(fmt.Sprintf("data/%03d", i), 0o644, string(body)))
	}
	entries = append(entries, kit.Dir("bin", 0o755), guest)
	image.Layers = append(image.Layers, kit.NewLayer(kit.Gzip, entries...))
	return image, nil
}
