package kit

import (
	"strings"
	"text/template"
)

// K3sDir is where k3s has its templates and the file that it renders.
const K3sDir = "/var/lib/rancher/k3s/agent/etc/containerd"

// K3sSocket is where k3s and RKE2 have the socket of their containerd.
const K3sSocket = "/run/k3s/containerd/containerd.sock"

// K3sArgs is how k3s starts containerd.
var K3sArgs = []string{
	"-c", K3sDir + "/config.toml", "-a", K3sSocket,
	"--state", "/run/k3s/containerd", "--root", "/var/lib/rancher/k3s/agent/containerd",
}

// K3sNode is what the tables below take from the node, by the names that users
// write into templates of their own.
type K3sNode struct{ Snapshotter, Pause string }

// Render is containerd's configuration of a version as k3s makes it: the user's template, in
// which "base" is k3s' own.
func (n K3sNode) Render(version int, user string) (string, error) {
	tmpl, err := template.New("user").Parse(user)
	if err != nil {
		return "", err
	}
	_, err = tmpl.New("base").Parse(K3sBase[version])
	if err != nil {
		return "", err
	}
	var out strings.Builder
	err = tmpl.ExecuteTemplate(&out, "user", n)
	return out.String(), err
}

// K3sBase are the tables and keys that k3s renders under the name "base", by the
// version of containerd's configuration. k3s itself is not in the module proxy;
// these were taken from rendered files. What matters is which tables exist, since
// a second one of the same name keeps containerd from starting.
var K3sBase = map[int]string{
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
