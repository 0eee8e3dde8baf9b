package configs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

const (
	nodeDir       = "../../deploy"
	installedUnit = "/etc/systemd/system/durable-snapshotter.service"
	installedBin  = "/opt/durable-snapshotter/bin/durable-snapshotter"
	registerText  = "/etc/containerd/conf.d/durable-register.toml"
	switchText    = "/etc/containerd/conf.d/durable-switch.toml"
)

// installer is a machine with the script of the DaemonSet. What the script would do by
// systemctl and crictl is done here: the daemon that the unit names and containerd are
// real ones, and so is the answer of the CRI plugin.
type installer struct {
	*machine
	t      *testing.T
	daemon *kit.Process
	files  string   // of the image
	node   []string // settings in place of those of the platform
	work   string   // of the pod, and of the two programs
	calls  []string // of them
	render func()   // before each start of containerd
}

// newInstaller starts containerd, as a node has it before durable-snapshotter.
func newInstaller(t *testing.T) *installer {
	t.Helper()
	n := &installer{machine: newMachine(t, "2.4.2"), t: t, files: kittest.Scratch(t), work: kittest.Scratch(t), render: func() {}}
	upper, work := filepath.Join(n.work, "upper"), filepath.Join(n.work, "overlay")
	check(t, errors.Join(os.Mkdir(upper, 0o755), os.Mkdir(work, 0o755), os.MkdirAll("/run/systemd/system", 0o755)))
	mount(t, "overlay", "/usr/local", "overlay", 0, fmt.Sprintf("lowerdir=/usr/local,upperdir=%s,workdir=%s", upper, work))
	// What this machine may have must not be what the script finds.
	mount(t, "tmpfs", "/usr/lib/systemd", "tmpfs", 0, "mode=755")
	check(t, errors.Join(os.RemoveAll("/usr/local/bin/durable-snapshotter"), os.RemoveAll("/usr/local/lib/systemd")))
	for _, unit := range []string{"durable-snapshotter.service", "durable-snapshotter.socket"} {
		write(t, filepath.Join(n.files, unit), string(must[[]byte](t)(os.ReadFile("../../packaging/systemd/"+unit))))
	}
	n.image("")
	n.serve()
	t.Cleanup(func() {
		if n.daemon != nil {
			kittest.Stop(t, n.daemon)
		}
	})
	write(t, mainFile, version3Main(t, n.machine))
	check(t, n.startContainerd(t))
	return n
}

// image makes another version of the program, or another program, that of the image.
func (n *installer) image(program string) {
	n.t.Helper()
	if program == "" {
		program = string(must[[]byte](n.t)(os.ReadFile(n.bins.Daemon))) + strconv.Itoa(len(n.calls))
	}
	name := filepath.Join(n.files, "durable-snapshotter")
	check(n.t, os.WriteFile(name, []byte(program), 0o755))
}

// fake passes a call to the test, and ends with its answer.
const fake = `#!/bin/sh
echo "$(basename "$0") $*" >DIR/call
cat DIR/output
exit "$(cat DIR/status)"
`

// serve answers the programs that the script calls, until the end of the test.
func (n *installer) serve() {
	n.t.Helper()
	for _, name := range []string{"call", "output", "status"} {
		check(n.t, exec.Command("mkfifo", filepath.Join(n.work, name)).Run())
	}
	for _, name := range []string{"systemctl", "crictl"} {
		name = filepath.Join(n.work, "bin", name)
		write(n.t, name, strings.ReplaceAll(fake, "DIR", n.work))
		check(n.t, os.Chmod(name, 0o755))
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			call, err := os.ReadFile(filepath.Join(n.work, "call"))
			if err != nil || string(call) == "end\n" {
				return
			}
			n.calls = append(n.calls, strings.TrimSpace(string(call)))
			out, status := n.answer(strings.Fields(string(call)))
			_ = os.WriteFile(filepath.Join(n.work, "output"), []byte(out), 0)
			_ = os.WriteFile(filepath.Join(n.work, "status"), []byte(strconv.Itoa(status)), 0)
		}
	}()
	n.t.Cleanup(func() {
		check(n.t, os.WriteFile(filepath.Join(n.work, "call"), []byte("end\n"), 0))
		<-done
	})
}

// answer does what a call is for.
func (n *installer) answer(call []string) (out string, status int) {
	err := func() error {
		daemon, containerd := slices.Contains(call, "durable-snapshotter.service"), slices.Contains(call, "containerd.service")
		running := n.daemon != nil && n.daemon.Running()
		switch verb := call[1]; {
		case call[0] == "crictl":
			return n.imageFs(&out)
		case verb == "daemon-reload":
			return nil
		case verb == "is-active" && (daemon || containerd):
			if daemon && !running || containerd && !n.process.Running() {
				status = 3
			}
			return nil
		case verb == "enable" && daemon && !running:
			return n.startUnit()
		case verb == "enable" && daemon:
			return nil
		case verb == "restart" && daemon:
			return errors.Join(n.stopUnit(), n.startUnit())
		case (verb == "stop" || verb == "disable") && daemon:
			return n.stopUnit()
		case verb == "restart" && containerd:
			n.render()
			return errors.Join(n.process.Stop(), n.startContainerd(n.t))
		}
		return fmt.Errorf("%q is not what the script does", call)
	}()
	if err != nil {
		return err.Error() + "\n", 1
	}
	return out, status
}

// startUnit starts what the unit names, and does not wait until it serves.
func (n *installer) startUnit() (err error) {
	text, err := os.ReadFile(installedUnit)
	if err != nil {
		return err
	}
	start := regexp.MustCompile(`(?m)^ExecStart=(.*)$`).FindSubmatch(text)
	if start == nil {
		return errors.New("the unit starts nothing")
	}
	n.daemon, err = kit.StartProcess("durable-snapshotter", filepath.Join(n.logs, "daemon"), nil, strings.Fields(string(start[1]))...)
	return err
}

func (n *installer) stopUnit() error {
	if n.daemon == nil || !n.daemon.Running() {
		return nil
	}
	return n.daemon.Stop()
}

// imageFs is crictl imagefsinfo.
func (n *installer) imageFs(out *string) error {
	conn, err := grpc.NewClient("unix://"+n.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(n.t.Context(), time.Minute)
	defer cancel()
	r, err := runtimeapi.NewImageServiceClient(conn).ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
	if err != nil {
		return err
	}
	text, err := json.Marshal(r.ImageFilesystems)
	*out = string(text)
	return err
}

// run runs the script as a pod does, in a stage, and returns its log. The error is its
// exit status.
func (n *installer) run(verb, stage string, env ...string) (log string, err error) {
	n.t.Helper()
	n.calls = nil
	ctx, cancel := context.WithTimeout(n.t.Context(), 15*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", filepath.Join(nodeDir, "base/node.sh"), verb)
	path := "PATH=" + filepath.Join(n.work, "bin") + ":" + os.Getenv("PATH")
	cmd.Env = append(os.Environ(), "HOST=", "ENTER=env "+path, "FILES="+n.files, "PLATFORM="+filepath.Join(nodeDir, "containerd"),
		"READY="+filepath.Join(n.work, "ready"), "STAGE="+stage, "ONCE=yes", "FRESH_MINUTES=0")
	settings := must[[]byte](n.t)(os.ReadFile(filepath.Join(nodeDir, "containerd/settings.env")))
	cmd.Env = append(append(cmd.Env, strings.Split(strings.TrimSpace(string(settings)), "\n")...), append(n.node, env...)...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// works runs the script, which must succeed, and expects the restarts of units, in order.
func (n *installer) works(verb, stage string, restarts ...string) {
	n.t.Helper()
	log, err := n.run(verb, stage)
	if err != nil {
		n.t.Fatalf("%s, stage %q: %v\n%s\n%s", verb, stage, err, log, strings.Join(n.calls, "\n"))
	}
	n.restarted(verb+" "+stage+"\n"+log, restarts...)
}

// fails runs the script, which must fail with words and leave containerd alone.
func (n *installer) fails(verb, stage, words string, env ...string) {
	n.t.Helper()
	if log, err := n.run(verb, stage, env...); err == nil || !strings.Contains(log, words) {
		n.t.Errorf("%s, stage %q: %v, want %q:\n%s", verb, stage, err, words, log)
	}
	if slices.Contains(n.calls, "systemctl restart containerd.service") {
		n.t.Errorf("%s, stage %q has restarted containerd, and fails with %q", verb, stage, words)
	}
}

func (n *installer) restarted(what string, want ...string) {
	n.t.Helper()
	var got []string
	for _, call := range n.calls {
		if unit, ok := strings.CutPrefix(call, "systemctl restart "); ok {
			got = append(got, unit)
		}
	}
	if !slices.Equal(got, want) {
		n.t.Errorf("restarted %q, want %q: %s", got, want, what)
	}
}

// pulled pulls a new image as the kubelet does.
func (n *installer) pulled() kit.Pushed {
	n.t.Helper()
	img := push(n.t)
	conn := must[*grpc.ClientConn](n.t)(grpc.NewClient("unix://"+n.socket, grpc.WithTransportCredentials(insecure.NewCredentials())))
	defer conn.Close()
	spec := &runtimeapi.ImageSpec{Image: img.Ref}
	check(n.t, n.process.WaitReady(n.t.Context(), time.Minute, func(ctx context.Context) error {
		_, err := runtimeapi.NewImageServiceClient(conn).PullImage(ctx, &runtimeapi.PullImageRequest{Image: spec})
		return err
	}))
	return img
}

// TestInstaller takes a node with an image through the stages of the DaemonSet, an
// upgrade, and back. containerd is restarted twice on the way in, and twice on the way
// back; what is done already is not done again.
func TestInstaller(t *testing.T) {
	n := newInstaller(t)
	img := n.pulled()

	const packaged = "/usr/lib/systemd/system/durable-snapshotter.service"
	write(t, packaged, "[Service]\n")
	n.fails("install", "install", "this node has a package")
	check(t, os.Remove(packaged))
	n.works("install", "install")
	n.works("install", "install")
	if n.plugin(t, "io.containerd.snapshotter.v1", "durable") != nil {
		t.Error("the stage install has changed containerd")
	}
	n.fails("install", "switch", "has not been through register")

	main := string(must[[]byte](t)(os.ReadFile(mainFile)))
	write(t, mainFile, imports.ReplaceAllString(main, ""))
	n.fails("install", "register", "does not import /etc/containerd/conf.d")
	write(t, mainFile, main)
	n.works("install", "register", "containerd.service")
	n.works("install", "register")
	if got := n.pulled(); !n.holds(t, "overlayfs", got.Top()) {
		t.Error("pods have another snapshotter before their images are there")
	}

	blob := filepath.Join("/var/lib/containerd/io.containerd.content.v1.content/blobs/sha256", img.Layers[0].Digest.Encoded())
	check(t, os.Rename(blob, blob+".away"))
	n.fails("install", "switch", "images are not complete on this node")
	check(t, os.Rename(blob+".away", blob))
	if _, err := os.Stat(switchText); err == nil || n.holds(t, "durable", img.Top()) {
		t.Error("a node that lacks a blob has switched")
	}
	n.works("install", "switch", "containerd.service")
	if !n.committed(t, img.Top()) {
		t.Error("containerd was switched before the image was there")
	}
	want := effect{Snapshotter: "durable", ImageFs: durableDir, Pause: true, SystemdCgroup: true}
	if got := n.observe(t); got != want {
		t.Errorf("the effect is %+v, want %+v", got, want)
	}
	n.works("install", "switch")
	if log, err := n.run("install", "switch", "CRICTL=/no-such-crictl"); err != nil {
		t.Errorf("without crictl: %v\n%s", err, log)
	}
	n.restarted("without crictl")

	n.upgrade()
	n.wayBack()
}

// TestInstallerTemplate does the same by a file that is edited, as of MicroK8s, whose
// wrapper puts a name in place of a variable when it starts containerd. Afterwards the
// file is what it was. There is no crictl, which MicroK8s does not have.
func TestInstallerTemplate(t *testing.T) {
	n := newInstaller(t)
	const file = "/opt/containerd-template.toml"
	before := set(t, string(must[[]byte](t)(os.ReadFile(mainFile))), `plugins."io.containerd.cri.v1.images"`, "snapshotter", `"${SNAPSHOTTER}"`)
	write(t, file, before)
	n.node = []string{"TEMPLATE=" + file, "MAIN=", "REGISTER=", "SWITCH=", "CRICTL=/no-such-crictl", "PLATFORM=" + filepath.Join(nodeDir, "microk8s")}
	n.render = func() {
		text, err := os.ReadFile(file)
		if err == nil {
			err = os.WriteFile(mainFile, []byte(strings.ReplaceAll(string(text), "${SNAPSHOTTER}", "overlayfs")), 0o644)
		}
		if err != nil {
			t.Error(err)
		}
	}
	// The configuration of the daemon is that of the platform, and its paths are not those of this machine.
	write(t, "/etc/durable-snapshotter/config.toml", string(must[[]byte](t)(os.ReadFile(filepath.Join(nodeDir, "containerd/config.toml")))))
	n.works("install", "register", "containerd.service")
	n.works("install", "switch", "containerd.service")
	n.works("install", "switch")
	want := effect{Snapshotter: "durable", ImageFs: durableDir, Pause: true, SystemdCgroup: true}
	if got := n.observe(t); got != want {
		t.Errorf("the effect is %+v, want %+v", got, want)
	}
	n.fails("remove", "", "run back first")
	n.works("back", "", "containerd.service")
	n.works("back", "")
	n.works("remove", "", "containerd.service")
	if got := string(must[[]byte](t)(os.ReadFile(file))); got != before {
		t.Errorf("the template is another one:\n%s", got)
	}
}

// upgrade: a new program has its daemon restarted, and one that does not serve is taken
// back.
func (n *installer) upgrade() {
	n.t.Helper()
	n.image("")
	n.works("install", "switch", "durable-snapshotter.service")
	good := must[[]byte](n.t)(os.ReadFile(installedBin))
	n.image("#!/bin/sh\nexit 1\n")
	n.fails("install", "switch", "the daemon does not serve", "PATIENCE=3")
	if got := must[[]byte](n.t)(os.ReadFile(installedBin)); string(got) != string(good) {
		n.t.Error("the program that does not serve is left")
	}
	kittest.WaitFor(n.t, time.Minute, func() error { return exec.Command(installedBin, "health").Run() })
	check(n.t, os.WriteFile(filepath.Join(n.files, "durable-snapshotter"), good, 0o755))
	n.works("install", "switch")
}

// wayBack: containerd returns to overlayfs, and when no container stands on a layer any
// more, all that was installed goes.
func (n *installer) wayBack() {
	t := n.t
	t.Helper()
	n.fails("remove", "", "run back first")
	n.works("back", "", "containerd.service")
	img := n.pulled()
	if !n.holds(t, "overlayfs", img.Top()) {
		t.Error("after back, pods do not have overlayfs")
	}
	n.works("back", "")

	check(t, n.stopUnit())
	n.fails("remove", "", "the daemon serves, which alone knows", "PATIENCE=2")
	check(t, n.startUnit())
	// containerd does not connect at once to a daemon that was away.
	kittest.WaitFor(t, time.Minute, func() error {
		if out, err := n.ctr(t, "snapshots", "--snapshotter", "durable", "prepare", "held", ""); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	n.fails("remove", "", "recreate their pods", "PATIENCE=2")
	must[string](t)(n.ctr(t, "snapshots", "--snapshotter", "durable", "rm", "held"))
	n.works("remove", "", "containerd.service")
	for _, name := range []string{installedUnit, installedBin, registerText, switchText, "/usr/local/bin/durable-snapshotter"} {
		if _, err := os.Lstat(name); err == nil {
			t.Errorf("%s is left", name)
		}
	}
	if n.plugin(t, "io.containerd.snapshotter.v1", "durable") != nil || n.daemon.Running() {
		t.Error("containerd has the snapshotter still, or the daemon runs")
	}
	if got := n.pulled(); !n.holds(t, "overlayfs", got.Top()) {
		t.Error("containerd does not pull any more")
	}
}
