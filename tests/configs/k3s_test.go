package configs

import (
	"strings"
	"testing"
	"text/template"
)

// k3sDir is where k3s has its templates and the file that it renders.
const k3sDir = "/var/lib/rancher/k3s/agent/etc/containerd"

// k3sArgs is how k3s starts containerd.
var k3sArgs = []string{
	"-c", k3sDir + "/config.toml", "-a", "/run/k3s/containerd/containerd.sock",
	"--state", "/run/k3s/containerd", "--root", "/var/lib/rancher/k3s/agent/containerd",
}

// k3sNode is what the tables below take from the node, by the names that users
// write into templates of their own.
type k3sNode struct{ Snapshotter, Pause string }

// k3sBase are the tables and keys that k3s renders under the name "base", by the
// version of containerd's configuration. k3s itself is not in the module proxy;
// these were taken from rendered files. What matters is which tables exist, since
// a second one of the same name keeps containerd from starting.
var k3sBase = map[int]string{
	3: `version = 3
imports = ["/var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.d/*.toml"]
root = "/var/lib/rancher/k3s/agent/containerd"
state = "/run/k3s/containerd"
[grpc]
  address = "/run/k3s/containerd/containerd.sock"
[plugins.'io.containerd.internal.v1.opt']
  path = "/var/lib/rancher/k3s/agent/containerd"
[plugins.'io.containerd.grpc.v1.cri']
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
[plugins.'io.containerd.cri.v1.runtime']
  enable_selinux = false
  enable_unprivileged_ports = true
  enable_unprivileged_icmp = true
  device_ownership_from_security_context = false
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "{{ .Snapshotter }}"
  disable_snapshot_annotations = true
  use_local_image_pull = true
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "{{ .Pause }}"
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ["/var/lib/rancher/k3s/data/cni"]
  conf_dir = "/var/lib/rancher/k3s/agent/etc/cni/net.d"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  SystemdCgroup = true
[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = "/var/lib/rancher/k3s/agent/etc/containerd/certs.d"
`,
	2: `version = 2
[plugins."io.containerd.internal.v1.opt"]
  path = "/var/lib/rancher/k3s/agent/containerd"
[plugins."io.containerd.grpc.v1.cri"]
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  enable_selinux = false
  enable_unprivileged_ports = true
  enable_unprivileged_icmp = true
  sandbox_image = "{{ .Pause }}"
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "{{ .Snapshotter }}"
  disable_snapshot_annotations = true
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/var/lib/rancher/k3s/data/cni"
  conf_dir = "/var/lib/rancher/k3s/agent/etc/cni/net.d"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
  SystemdCgroup = true
[plugins."io.containerd.grpc.v1.cri".registry]
  config_path = "/var/lib/rancher/k3s/agent/etc/containerd/certs.d"
`,
}

// render writes containerd's configuration as k3s does: the user's template, in
// which "base" is k3s' own.
func render(t *testing.T, m *machine, version int, user string, text map[string]string) []string {
	t.Helper()
	write(t, "/etc/durable-snapshotter/config.toml", text[textDurable])
	snapshotter := ""
	for line := range strings.Lines(text[textYAML]) {
		if v, ok := strings.CutPrefix(line, "snapshotter: "); ok {
			snapshotter = strings.TrimSpace(v)
		}
	}
	tmpl := must[*template.Template](t)(template.New("user").Parse(user))
	must[*template.Template](t)(tmpl.New("base").Parse(k3sBase[version]))
	var out strings.Builder
	check(t, tmpl.ExecuteTemplate(&out, "user", k3sNode{Snapshotter: snapshotter, Pause: pauseRef()}))
	write(t, k3sDir+"/config.toml", out.String())
	m.socket = "/run/k3s/containerd/containerd.sock"
	return k3sArgs
}

func k3sTemplate(version int, key string) put {
	return func(t *testing.T, m *machine, text map[string]string) []string {
		return render(t, m, version, text[key], text)
	}
}

func k3sDropIn(t *testing.T, m *machine, text map[string]string) []string {
	write(t, textDropin, text[textDropin])
	return render(t, m, 3, `{{ template "base" . }}`, text)
}
