package packaging

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// The words after "sh" in README.md, beside the names of platforms, that mark the commands of a
// new user.
const (
	everywhere = "node"
	afterCut   = "node-after-power-cut"
)

// platform is a node as somebody has it before durable-snapshotter, and what doctor may warn of
// there when all is done.
type platform struct {
	name, release string
	system        func(t *testing.T) *systemdNode
	warnings      []string
}

var platforms = []platform{
	{"containerd-2", kit.Current, upstreamNode, nil},
	{"debian-12", "1.6.20", debianNode, []string{"versions"}},
	{"k3s", kit.Current, k3sNode, nil},
}

// upstreamNode has containerd from its release, which brings no configuration.
func upstreamNode(t *testing.T) *systemdNode {
	n := &systemdNode{}
	n.root, n.disk = kittest.NewSystem(t, systemdPackages...)
	kittest.InstallContainerd(t, filepath.Join(n.root, "usr/local/bin"))
	n.service(t, "containerd.service", "ExecStart=/usr/local/bin/containerd")
	return n
}

// debianNode has Debian's package of containerd, with its unit and its configuration.
func debianNode(t *testing.T) *systemdNode {
	n := &systemdNode{}
	n.root, n.disk = kittest.NewSystem(t, "systemd", "systemd-sysv", "procps", "containerd")
	return n
}

// k3sNode has a service that does what k3s does to containerd: at each start it renders the
// configuration, with the snapshotter of its own, and starts the containerd that it brings. Its
// installer makes the link ctr.
func k3sNode(t *testing.T) *systemdNode {
	n := &systemdNode{}
	n.root, n.disk = kittest.NewSystem(t, systemdPackages...)
	const bin = "/var/lib/rancher/k3s/data/current/bin"
	kittest.InstallContainerd(t, filepath.Join(n.root, bin))
	base := must[string](t)(kit.K3sNode{Snapshotter: "@snapshotter@", Pause: "docker.io/rancher/mirrored-pause:3.6"}.Render(3, `{{ template "base" . }}`))
	n.write(t, "usr/local/share/k3s-base", base, 0o644)
	n.write(t, "etc/rancher/k3s/config.yaml", "write-kubeconfig-mode: \"0640\"\n", 0o600)
	n.write(t, "usr/local/bin/k3s-render", fmt.Sprintf(`#!/bin/sh -e
name=$(sed -n 's/^snapshotter: *//p' /etc/rancher/k3s/config.yaml)
mkdir -p %[1]s
sed "s/@snapshotter@/${name:-overlayfs}/" /usr/local/share/k3s-base >%[1]s/config.toml
`, kit.K3sDir), 0o755)
	n.write(t, "usr/local/bin/ctr", fmt.Sprintf("#!/bin/sh\nCONTAINERD_ADDRESS=%s CONTAINERD_NAMESPACE=k8s.io exec %s/ctr \"$@\"\n", kit.K3sSocket, bin), 0o755)
	n.service(t, "k3s.service", "Environment=PATH="+bin+":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin",
		"ExecStartPre=/usr/local/bin/k3s-render", "ExecStart="+bin+"/containerd "+strings.Join(kit.K3sArgs, " "))
	return n
}

// withoutShares is in the place of runc: ctr requests shares of the processor, for which the
// machine has no controller.
const withoutShares = `#!/bin/sh
last=
for a; do
	[ "$last" != --bundle ] || sed -i 's/"shares":1024/"shares":0/' "$a/config.json"
	last=$a
done
exec /usr/sbin/runc "$@"
`

// block is a fenced text of README.md.
type block struct {
	mark  string
	lines []string
}

// blocks are the commands of README.md for a node of a platform, in their order.
func blocks(t *testing.T, platform string) (all []block) {
	t.Helper()
	text := string(must[[]byte](t)(os.ReadFile("../../README.md")))
	for _, b := range regexp.MustCompile("(?ms)^```sh ([a-z0-9-]+)\n(.*?)^```$").FindAllStringSubmatch(text, -1) {
		if b[1] == platform || b[1] == everywhere || b[1] == afterCut {
			all = append(all, block{b[1], strings.Split(strings.TrimSuffix(b[2], "\n"), "\n")})
		}
	}
	return all
}

// TestReadmeMarks: each marked block of README.md is for a platform that TestReadme has.
func TestReadmeMarks(t *testing.T) {
	text := string(must[[]byte](t)(os.ReadFile("../../README.md")))
	known := []string{everywhere, afterCut}
	for _, p := range platforms {
		known = append(known, p.name)
		if n := len(blocks(t, p.name)); n < 7 {
			t.Errorf("README.md has only %d blocks for %s", n, p.name)
		}
	}
	for _, m := range regexp.MustCompile("(?m)^```sh(.*)$").FindAllStringSubmatch(text, -1) {
		if mark := strings.TrimSpace(m[1]); !slices.Contains(known, mark) {
			t.Errorf("README.md has commands for %q, which no test runs", mark)
		}
	}
}

// user is somebody who follows README.md on a node.
type user struct {
	*systemdNode
	platform platform
	doctors  int // how often doctor was run
}

// TestReadme follows README.md on a new system of each platform, by the commands as they are
// printed, under a running container: install, switch, move the images, pull, run, a power cut,
// check, and back. All commands but the first doctor succeed.
func TestReadme(t *testing.T) {
	onMachines(t)
	needs(t, "debootstrap")
	dir := release(t, "v1.0.0")
	hub := newHub(t)
	for _, p := range platforms {
		t.Run(p.name, func(t *testing.T) {
			u := &user{systemdNode: p.system(t), platform: p}
			hub.known(t, u.systemdNode)
			u.write(t, "usr/local/sbin/runc", withoutShares, 0o755)
			u.boot(t)
			if out := u.ctr(t, "version"); !strings.Contains(out, p.release) {
				t.Errorf("the node has another containerd: %s", out)
			}
			command(t, "", nil, "cp", the(t, dir+"/*.deb"), u.Path("/root"))
			u.ctr(t, "image", "pull", "docker.io/library/before:latest")
			u.ctr(t, "run", "-d", "docker.io/library/before:latest", "stays", "/bin/guest", "wait")
			cut := false
			for _, b := range blocks(t, p.name) {
				if b.mark == afterCut && !cut {
					cut = true
					u.stillRuns(t)
					u.wantSwitched(t)
					u.losePower(t)
				}
				u.follow(t, b)
				if b.mark == p.name && !cut {
					u.follow(t, b) // pasted once more, it changes nothing
				}
				if t.Failed() {
					t.FailNow()
				}
			}
			if u.doctors < 2 || !cut {
				t.Errorf("doctor was run %d times; the power was cut: %v", u.doctors, cut)
			}
			u.wantNothingLeft(t)
		})
	}
}

// follow runs the commands of a block in one shell, as if they were pasted.
func (u *user) follow(t *testing.T, b block) {
	t.Helper()
	script := "cd /root\n"
	for i, line := range b.lines {
		script += fmt.Sprintf("{ %s\n} >/root/out 2>&1; echo \"$? %d\"; cat /root/out; echo\n", line, i)
	}
	out := in(t, u.Machine, "sh", "-c", script)
	results := regexp.MustCompile(`(?m)^(\d+) (\d+)$`).FindAllStringSubmatchIndex(out, -1)
	if len(results) != len(b.lines) {
		t.Fatalf("%d results of %d commands:\n%s", len(results), len(b.lines), out)
	}
	for i, r := range results {
		end := len(out)
		if i+1 < len(results) {
			end = results[i+1][0]
		}
		u.judge(t, b.lines[i], out[r[2]:r[3]], strings.TrimSpace(out[r[1]:end]))
	}
}

// judge verifies what has come of a command.
func (u *user) judge(t *testing.T, line, status, out string) {
	t.Helper()
	t.Logf("# %s\n%s", line, out)
	command, _, _ := strings.Cut(line, "#")
	command = strings.TrimSpace(command)
	if command == "durable-snapshotter check --images" {
		wantReady(t, out)
	}
	if command != "durable-snapshotter doctor" {
		if status != "0" {
			t.Errorf("%s: exit status %s", line, status)
		}
		return
	}
	u.doctors++
	if u.doctors == 1 {
		if status != "2" || !strings.Contains(out, "--print-config") {
			t.Errorf("doctor on a node that does not use the snapshotter: exit status %s", status)
		}
		return
	}
	if status == "2" {
		t.Errorf("doctor on a node that is switched: exit status %s", status)
	}
}

// finding is a line of doctor.
type finding struct{ Check, Level, Text string }

func (u *user) doctor(t *testing.T) (found []finding) {
	t.Helper()
	out := in(t, u.Machine, "sh", "-c", "durable-snapshotter doctor --json || true")
	check(t, json.Unmarshal([]byte(out), &found))
	return found
}

// wantSwitched verifies that doctor finds nothing but what it may on this platform, and with that
// what the running CRI plugin answers.
func (u *user) wantSwitched(t *testing.T) {
	t.Helper()
	for _, f := range u.doctor(t) {
		// The container that was there before has its old snapshots.
		if f.Level != "ok" && f.Check != "containers" && !slices.Contains(u.platform.warnings, f.Check) {
			t.Errorf("on a node that is switched, doctor finds %+v", f)
		}
	}
}

// cuts is how often the machine has lost its power since the installation, by the journal.
func (u *user) cuts(t *testing.T) int {
	t.Helper()
	var report struct {
		Journal struct{ Run struct{ Epoch int } }
	}
	check(t, json.Unmarshal([]byte(in(t, u.Machine, "durable-snapshotter", "inspect", "--json")), &report))
	return report.Journal.Run.Epoch - 1 // the first start is the first epoch
}

// losePower cuts the power, and verifies that it took what was not synced.
func (u *user) losePower(t *testing.T) {
	t.Helper()
	before := u.cuts(t)
	in(t, u.Machine, "sh", "-c", "echo lost >/root/unsynced")
	u.cutPower(t)
	if out, _ := u.Run(t.Context(), "cat", "/root/unsynced"); out != "" {
		t.Error("a file that was not synced has survived the power cut")
	}
	if after := u.cuts(t); before != 0 || after != 1 {
		t.Errorf("the journal has %d power cuts before this one, and %d after it", before, after)
	}
}

// wantReady verifies that check --images found all images ready.
func wantReady(t *testing.T, out string) {
	t.Helper()
	for _, name := range []string{"before", "alpine"} {
		if !regexp.MustCompile(`(?m)^docker\.io/library/` + name + `:latest .* ready *`).MatchString(out) {
			t.Errorf("%s is not ready", name)
		}
	}
}

// wantNothingLeft verifies that the node is what it was, with its images.
func (u *user) wantNothingLeft(t *testing.T) {
	t.Helper()
	if out := u.ctr(t, "plugin", "ls"); strings.Contains(out, "durable") {
		t.Errorf("the plugins of containerd, afterwards:\n%s", out)
	}
	for _, ref := range []string{"before", "alpine"} {
		u.ctr(t, "run", "--rm", "docker.io/library/"+ref+":latest", "back-"+ref, "/bin/echo", "back")
	}
	for _, path := range []string{state, socket, "/usr/bin/durable-snapshotter", "/etc/durable-snapshotter"} {
		in(t, u.Machine, "test", "!", "-e", path)
	}
	out := in(t, u.Machine, "sh", "-c", "grep -rl durable /etc/containerd /etc/rancher "+kit.K3sDir+" 2>/dev/null || true")
	if out != "" {
		t.Errorf("files of containerd that have it still: %s", out)
	}
}

// hub stands for Docker Hub: the names in README.md are those of images there.
type hub struct {
	host string // address of its own on loopback, port 443
	ca   []byte
}

func newHub(t *testing.T) *hub {
	t.Helper()
	r := must[*kit.Registry](t)(kit.StartRegistry(kittest.Scratch(t)))
	t.Cleanup(func() { check(t, r.Close()) })
	for _, name := range []string{"before", "alpine"} {
		image := must[kit.Image](t)(kit.Runnable(t.Context()))
		image.Layers = append(image.Layers, kit.NewLayer(kit.Gzip, kit.Dir("bin", 0o755), kit.Symlink("bin/echo", "guest"), kit.File("name", 0o644, name)))
		_, err := kit.Push(t.Context(), r, "library/"+name, image)
		check(t, err)
	}
	key := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "tests"}, DNSNames: []string{"registry-1.docker.io"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der := must[[]byte](t)(x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key))
	s := httptest.NewUnstartedServer(httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: r.Host}))
	s.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	// Other tests of this kind may run: the network is the machine's.
	h := &hub{host: fmt.Sprintf("127.%d.7.1", 1+must[*big.Int](t)(rand.Int(rand.Reader, big.NewInt(250))).Int64()), ca: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
	check(t, s.Listener.Close())
	s.Listener = must[net.Listener](t)(net.Listen("tcp", h.host+":443"))
	s.StartTLS()
	t.Cleanup(s.Close)
	return h
}

// known makes a system find Docker Hub here, and trust it.
func (h *hub) known(t *testing.T, n *systemdNode) {
	t.Helper()
	n.write(t, "etc/hosts", "127.0.0.1 localhost\n"+h.host+" registry-1.docker.io\n", 0o644)
	n.write(t, "etc/ssl/certs/ca-certificates.crt", string(h.ca), 0o644)
}
