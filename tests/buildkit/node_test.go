package buildkit

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"github.com/durable-snapshotter/durable-snapshotter/storage"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// limit is how long a build may take, and the start of buildkitd: the machine may be slow.
const limit = 5 * time.Minute

// node is a node with buildkitd, whose root is on the node's disk.
type node struct {
	*kit.Node
	programs string // directory of buildkitd and buildctl
	run      string // buildkitd's socket, configuration and log
	buildkit *kit.Process
	base     kit.Pushed
}

// newNode starts a node whose containerd has further configuration.
func newNode(t *testing.T, containerd kit.ContainerdOptions) *node {
	t.Helper()
	dir := kittest.Scratch(t)
	r := must[*kit.Registry](t)(kit.StartRegistry(filepath.Join(dir, "registry")))
	const commands = "github.com/moby/buildkit/cmd/"
	n := &node{
		run:      kittest.Scratch(t),
		programs: must[string](t)(kit.BuildModule(t.Context(), "buildkit/programs", commands+"buildkitd", commands+"buildctl")),
	}
	n.Node = kittest.NewNode(t, kit.NodeOptions{Dir: dir, Registry: r, Heals: true, Notifies: true, Containerd: containerd})
	t.Cleanup(func() { check(t, n.Off()) })
	kittest.Start(t, n.Node)
	n.base = must[kit.Pushed](t)(n.Push(t.Context(), "base", must[kit.Image](t)(kit.Runnable(t.Context()))))
	check(t, os.WriteFile(filepath.Join(n.run, "buildkitd.toml"), fmt.Appendf(nil, `root = %q
[grpc]
  address = [%q]
[worker.oci]
  enabled = false
[worker.containerd]
  enabled = true
  address = %q
  namespace = %q
  snapshotter = "durable"
  networkMode = "host"
  defaultCgroupParent = %q
[registry.%q]
  http = true
`, n.Path("buildkit"), n.address(), n.Socket(), n.Namespace(), n.Containerd.Namespace, r.Host), 0o644))
	n.startBuildKit(t)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(n.buildkit.LogTail(6000))
		}
		check(t, n.buildkit.Kill()) // SIGTERM ends it with status 1
	})
	return n
}

func (n *node) address() string { return "unix://" + filepath.Join(n.run, "buildkitd.sock") }

func (n *node) startBuildKit(t *testing.T) {
	t.Helper()
	check(t, kit.EmptyRun(n.run))
	env := []string{"PATH=" + n.programs + ":" + os.Getenv("PATH")}
	n.buildkit = must[*kit.Process](t)(kit.StartProcess("buildkitd", filepath.Join(n.run, "buildkitd.log"), env,
		filepath.Join(n.programs, "buildkitd"), "--config", filepath.Join(n.run, "buildkitd.toml")))
	check(t, n.buildkit.WaitReady(t.Context(), limit, func(ctx context.Context) error {
		_, err := n.buildctl(ctx, "debug", "workers")
		return err
	}))
}

func (n *node) buildctl(ctx context.Context, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, filepath.Join(n.programs, "buildctl"), append([]string{"--addr", n.address()}, args...)...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("buildctl %s: %w: %s", args[0], err, out)
	}
	return string(out), err
}

// build builds an image whose container prints a text that a container of the build has
// written, and exports it as output has it.
func (n *node) build(t *testing.T, text, output string) {
	t.Helper()
	dir := kittest.Scratch(t)
	for name, body := range map[string]string{
		"copied": "copied for " + text,
		"Dockerfile": strings.Join([]string{
			"FROM " + n.base.Ref,
			"COPY copied /copied",
			fmt.Sprintf(`RUN ["/bin/guest", "write", "/written", %q]`, text),
			`RUN ["/bin/guest", "write", "/etc/motd", "changed by the build"]`,
			`CMD ["/bin/guest", "cat", "/written"]`,
		}, "\n"),
	} {
		check(t, os.WriteFile(filepath.Join(dir, name), []byte(body), 0o644))
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	if _, err := n.buildctl(ctx, "build", "--progress", "plain", "--frontend", "dockerfile.v0",
		"--local", "context="+dir, "--local", "dockerfile="+dir, "--output", output); err != nil {
		t.Fatalf("%v\n%s", err, n.buildkit.LogTail(4000))
	}
}

// runs fails the test unless a container of an image prints a text.
func (n *node) runs(t *testing.T, ref, text string, command ...string) {
	t.Helper()
	if got := n.container(t, "--rm", ref, "once", command...); got != text {
		t.Errorf("a container of %s has printed %q, want %q", ref, got, text)
	}
}

func (n *node) container(t *testing.T, flag, ref, name string, command ...string) string {
	t.Helper()
	return kittest.Ctr(t, n.Node, append([]string{"run", flag, "--snapshotter", "durable", ref, name}, command...)...)
}

// extracted is how many layers of the daemon's journal its own differ has extracted.
func (n *node) extracted(t *testing.T) int {
	t.Helper()
	layers := 0
	for _, e := range must[kit.Report](t)(n.Daemon.Inspect(t.Context())).Journal.Committed {
		if e.Strategy == string(storage.StrategyApplied) {
			layers++
		}
	}
	return layers
}

// tree is what a container of an image sees under a snapshotter.
func (n *node) tree(t *testing.T, snapshotter, ref string) (kit.Tree, error) {
	t.Helper()
	ctx, cl, err := n.Client(t.Context())
	check(t, err)
	defer cl.Close()
	img := must[client.Image](t)(cl.GetImage(ctx, ref))
	diffIDs := must[[]digest.Digest](t)(img.RootFS(ctx))
	p := kit.Puller{Client: cl, Snapshotter: snapshotter}
	tree, _, err := p.View(ctx, n.Namespace(), identity.ChainID(diffIDs).String())
	return tree, err
}

// ready fails the test unless check finds all layers whole, and check --images all images
// ready.
func (n *node) ready(t *testing.T, refs ...string) {
	t.Helper()
	if stdout, stderr, status := kittest.Verb(t, n.Daemon, "check", "--deep"); status != 0 {
		t.Errorf("check --deep: status %d: %s%s", status, stdout, stderr)
	}
	stdout, stderr, status := kittest.Verb(t, n.Daemon, "check", "--images", "--deep", "--json")
	var found []struct{ Image, Verdict, Reason string }
	if err := json.Unmarshal([]byte(stdout), &found); err != nil {
		t.Fatalf("check --images: status %d: %v: %s%s", status, err, stdout, stderr)
	}
	verdicts := map[string]string{}
	for _, f := range found {
		verdicts[f.Image] = strings.TrimSpace(f.Verdict + " " + f.Reason)
	}
	for _, ref := range refs {
		if verdicts[ref] != "ready" {
			t.Errorf("check --images reports of %s: %q, want that it is ready; all: %v", ref, verdicts[ref], slices.Sorted(maps.Keys(verdicts)))
		}
	}
}
