package configs

import (
	"encoding/json"
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// rke2DropIn is k3sDropIn with RKE2's paths. Its configuration has what k3s' has.
func rke2DropIn(t *testing.T, m *machine, text map[string]string) []string {
	ours := maps.Clone(text)
	ours[textYAML], ours[textDurable] = text[textRKE2YAML], text[textRKE2Durable]
	dir := filepath.Dir(filepath.Dir(textRKE2Dropin))
	write(t, textRKE2Dropin, text[textRKE2Dropin])
	args := render(t, m, 3, `{{ template "base" . }}`, ours)
	main := strings.ReplaceAll(string(must[[]byte](t)(os.ReadFile(kit.K3sDir+"/config.toml"))), "/var/lib/rancher/k3s/", "/var/lib/rancher/rke2/")
	write(t, filepath.Join(dir, "config.toml"), main)
	return strings.Split(strings.ReplaceAll(strings.Join(args, " "), "/var/lib/rancher/k3s/", "/var/lib/rancher/rke2/"), " ")
}

// merged puts the tables of one text into those of another, as k0s and Talos do before containerd
// reads the result. A list replaces a list.
func merged(t *testing.T, base, patch string) string {
	t.Helper()
	var into, from map[string]any
	check(t, toml.Unmarshal([]byte(base), &into))
	check(t, toml.Unmarshal([]byte(patch), &from))
	var merge func(into, from map[string]any)
	merge = func(into, from map[string]any) {
		for k, v := range from {
			a, table := into[k].(map[string]any)
			b, tables := v.(map[string]any)
			if table && tables {
				merge(a, b)
			} else {
				into[k] = v
			}
		}
	}
	merge(into, from)
	return string(must[[]byte](t)(toml.Marshal(into)))
}

// k0s: a file of the user with tables of the CRI plugin is merged into the one that k0s generates, and
// its main file imports the result.
func k0s(t *testing.T, m *machine, text map[string]string) []string {
	m.socket = "/run/k0s/containerd.sock"
	write(t, "/etc/durable-snapshotter/config.toml", text[textK0sDurable])
	write(t, textK0s, text[textK0s])
	write(t, "/run/k0s/containerd-cri.toml", merged(t, criBase(), string(must[[]byte](t)(os.ReadFile(textK0s)))))
	write(t, "/etc/k0s/containerd.toml", "version = 3\nimports = [\"/run/k0s/containerd-cri.toml\"]\n")
	return []string{"--root=/var/lib/k0s/containerd", "--state=/run/k0s/containerd", "--address=" + m.socket, "--config=/etc/k0s/containerd.toml"}
}

// criBase are the tables of the CRI plugin that k0s and Talos generate: those of k3s, but for its paths.
func criBase() string {
	_, tables, _ := strings.Cut(kit.K3sBase[3], "[plugins.'io.containerd.grpc.v1.cri']")
	tables = "version = 3\n[plugins.'io.containerd.grpc.v1.cri']" + tables
	return strings.NewReplacer("{{ .Snapshotter }}", "overlayfs", "{{ .Pause }}", pauseRef(), "use_local_image_pull = true", "use_local_image_pull = false").Replace(tables)
}

// talos merges the parts of a directory into one file, in the order of their names.
func talos(t *testing.T, m *machine, text map[string]string) []string {
	write(t, "/etc/cri/conf.d/00-base.part", criBase())
	write(t, textTalos, text[textTalos])
	whole := ""
	for _, path := range must[[]string](t)(filepath.Glob("/etc/cri/conf.d/*.part")) {
		whole = merged(t, whole, string(must[[]byte](t)(os.ReadFile(path))))
	}
	write(t, "/etc/cri/conf.d/cri.toml", whole)
	write(t, "/etc/cri/containerd.toml", "version = 3\nimports = [\"/etc/cri/conf.d/cri.toml\"]\n")
	return []string{"--config", "/etc/cri/containerd.toml"}
}

// microK8s fills the variables of its template in.
func microK8s(t *testing.T, m *machine, text map[string]string) []string {
	const args, common = "/var/snap/microk8s/current/args", "/var/snap/microk8s/common"
	template := strings.ReplaceAll(kit.K3sBase[2], "{{ .Snapshotter }}", "${SNAPSHOTTER}")
	template = strings.NewReplacer("${SNAPSHOTTER}", "durable", "{{ .Pause }}", pauseRef()).Replace(template) + text[textMicroK8s]
	if err := os.Mkdir("/var/snap", 0o755); err == nil {
		t.Cleanup(func() { check(t, os.Remove("/var/snap")) })
	} else if !errors.Is(err, os.ErrExist) {
		t.Fatal(err)
	}
	mount(t, "tmpfs", "/var/snap", "tmpfs", 0, "mode=755,size=1g")
	write(t, "/etc/durable-snapshotter/config.toml", text[textMicroK8sDur])
	write(t, args+"/containerd.toml", template)
	m.socket = common + "/run/containerd.sock"
	return []string{"--config", args + "/containerd.toml", "--root", common + "/var/lib/containerd", "--state", common + "/run/containerd", "--address", m.socket}
}

// finding is what doctor prints.
type finding struct{ Check, Level, Text, Cure string }

// doctor runs doctor with the release's containerd in PATH, and returns what it finds about
// containerd's configuration. args are those of containerd.
func (m *machine) doctor(t *testing.T, args []string) (bad []finding) {
	t.Helper()
	argv := []string{"doctor", "--json"}
	for i, a := range args {
		if v, ok := strings.CutPrefix(a, "--config="); ok {
			argv = append(argv, "--containerd-config", v)
		} else if a == "-c" || a == "--config" {
			argv = append(argv, "--containerd-config", args[i+1])
		}
	}
	cmd := exec.CommandContext(t.Context(), m.bins.Daemon, argv...)
	cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(m.bins.Containerd)+":"+os.Getenv("PATH"))
	out, _ := cmd.Output() // its status is about the whole machine
	var all []finding
	if err := json.Unmarshal(out, &all); err != nil {
		t.Fatalf("doctor: %v: %s", err, out)
	}
	for _, f := range all {
		if f.Level != "ok" && slices.Contains([]string{"plugin", "containerd-config", "cri-snapshotter", "unpack-config", "content-root"}, f.Check) {
			bad = append(bad, f)
		}
	}
	return bad
}

// expectFinding fails the test unless doctor names a cause.
func expectFinding(t *testing.T, found []finding, check, text string) {
	t.Helper()
	if !slices.ContainsFunc(found, func(f finding) bool {
		return f.Check == check && f.Level == "failure" && strings.Contains(f.Text, text) && f.Cure != ""
	}) {
		t.Errorf("doctor has no failure of %s with %q: %+v", check, text, found)
	}
}

// TestPrograms: the text for a containerd without the CRI plugin, as Docker's package configures it,
// and those of programs that are not here, as far as their syntax goes.
func TestPrograms(t *testing.T) {
	texts := documented(t)
	for _, release := range kittest.Releases(quickReleases...) {
		if !kit.Since(release, "2.0.14") {
			continue
		}
		t.Run(release, func(t *testing.T) {
			m := newMachine(t, release)
			write(t, mainFile, texts[textImports]+"version = 3\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n")
			write(t, confd, texts[textDocker])
			check(t, m.start(t))
			m.expectProxy(t, texts, []string{textDocker})
			m.pullWithCtr(t, "durable")
			m.pullWithCtr(t, "overlayfs")
		})
	}
	var docker struct {
		Driver   string          `json:"storage-driver"`
		Features map[string]bool `json:"features"`
	}
	_, body, _ := strings.Cut(texts[textDaemonJSON], "\n")
	check(t, json.Unmarshal([]byte(body), &docker))
	if docker.Driver != "durable" || !docker.Features["containerd-snapshotter"] {
		t.Errorf("%+v", docker)
	}
	var buildkit struct {
		Worker struct {
			Containerd struct {
				Enabled     bool
				Snapshotter string
			}
		}
	}
	check(t, toml.Unmarshal([]byte(texts[textBuildkitd]), &buildkit))
	if c := buildkit.Worker.Containerd; !c.Enabled || c.Snapshotter != "durable" {
		t.Errorf("%+v", buildkit)
	}
}

// TestPrinted: what the program prints for a platform is, word for word, the texts of the
// documentation, and all of those that TestTexts starts on it.
func TestPrinted(t *testing.T) {
	texts := documented(t)
	for platform, keys := range map[string][]string{
		"containerd-2": {textA}, "containerd-2.0": {textB}, "containerd-1.7": {textC, textD, textE},
		"k3s": {textYAML, textDropin, textDurable}, "rke2": {textRKE2YAML, textRKE2Dropin, textRKE2Durable},
		"k0s": {textK0s, textK0sDurable}, "microk8s": {textMicroK8s, textMicroK8sDur}, "talos": {textTalos},
		"docker": {textDocker, textDaemonJSON}, "buildkit": {textDocker, textBuildkitd},
	} {
		want := ""
		for i, key := range keys {
			if i > 0 {
				want += "\n"
			}
			want += texts[key]
		}
		out, err := exec.Command(kittest.Binaries(t).Daemon, "doctor", "--print-config", platform).Output()
		if err != nil || string(out) != want {
			t.Errorf("%s: %v: %s\nwant %s", platform, err, out, want)
		}
	}
	if out, err := exec.Command(kittest.Binaries(t).Daemon, "doctor", "--print-config", "k3s", textYAML).Output(); err != nil || string(out) != texts[textYAML] {
		t.Errorf("one file of k3s: %v: %s", err, out)
	}
	for _, c := range []struct{ args, want string }{
		{"--print-config k9s", "microk8s"}, {"--print-config k3s /etc/fstab", textYAML}, {"--print-config k3s a b", "unexpected"}, {"a", "unexpected"},
	} {
		out, err := exec.Command(kittest.Binaries(t).Daemon, append([]string{"doctor"}, strings.Fields(c.args)...)...).CombinedOutput()
		if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != 2 || !strings.Contains(string(out), c.want) {
			t.Errorf("doctor %s: %v: %s", c.args, err, out)
		}
	}
}
