package images

import (
	"context"
	"os/exec"
	"slices"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// TestInterrupted: repair --apply is killed after longer and longer times, until one comes to
// its end by itself. Whatever the others have left, each image is ready then, or gone and the
// pull of it clean.
func TestInterrupted(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	all := map[string]kit.Pushed{}
	for _, name := range []string{"heal", "drop-layer", "drop-names", "unpack"} {
		all[name] = n.pull(t, name)
	}
	damages["removed"](t, n, all["heal"])
	damages["removed"](t, n, all["drop-layer"])
	blobs["corrupt"](t, n.Blob(all["drop-layer"].Layers[1].Digest))
	rewrite(t, n.Blob(n.config(t, all["drop-names"])))
	n.lose(t, all["unpack"], 1)

	killed := 0
	for limit := 200 * time.Millisecond; ; limit += limit / 2 {
		if n.repairFor(t, limit) {
			break
		}
		killed++
	}
	t.Logf("killed %d times", killed)
	if killed == 0 {
		t.Error("no repair was cut short")
	}
	if left, status := n.images(t, "repair", "--apply"); status != 0 {
		t.Errorf("repair once more: status %d: %+v", status, left)
	}
	p := must[*kit.Pod](t)(n.CRI.StartPod(t.Context()))
	defer func() { check(t, p.Remove(context.WithoutCancel(t.Context()))) }()
	for name, img := range all {
		if dropped := name == "drop-layer" || name == "drop-names"; must[bool](t)(n.CRI.Known(t.Context(), img.Ref)) == dropped {
			check(t, n.CRI.WaitKnown(t.Context(), img.Ref, !dropped))
		}
		check(t, n.CRI.Pull(t.Context(), img.Ref))
		n.runs(t, p, img)
	}
	if found, status := n.images(t, "check", "--deep"); status != 0 {
		t.Errorf("at the end: status %d: %+v", status, found)
	}
}

// repairFor runs repair --images --apply, kills it after a time, and reports whether it has
// come to its end.
func (n *node) repairFor(t *testing.T, limit time.Duration) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	argv := append(n.Daemon.Argv(), "--images", "--apply")
	argv[slices.Index(argv, "serve")] = "repair"
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState != nil && !cmd.ProcessState.Exited() {
		return false
	}
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return true
}
