package deploy

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestExtensions builds the extensions for Talos and Flatcar, and compares their trees
// with what those systems document.
func TestExtensions(t *testing.T) {
	out := filepath.Join(t.TempDir(), "extensions")
	cmd := exec.CommandContext(t.Context(), must[string](t)(filepath.Abs(filepath.Join(deployed, "platforms/build.sh"))))
	cmd.Env = append(os.Environ(), "OUT="+out, "BIN="+kittest.Binaries(t).Daemon, "VERSION=v1.2.3")
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	var files []string
	check(t, filepath.WalkDir(out, func(name string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && !strings.HasSuffix(name, ".raw") {
			files = append(files, strings.TrimPrefix(name, out+"/"))
		}
		return err
	}))
	const container = "talos/rootfs/usr/local/lib/containers/durable-snapshotter/"
	want := []string{
		"flatcar/durable-snapshotter/usr/bin/durable-snapshotter",
		"flatcar/durable-snapshotter/usr/lib/extension-release.d/extension-release.durable-snapshotter",
		"flatcar/durable-snapshotter/usr/lib/systemd/system/durable-snapshotter.service",
		"flatcar/durable-snapshotter/usr/lib/systemd/system/durable-snapshotter.socket",
		"flatcar/durable-snapshotter/usr/lib/systemd/system/multi-user.target.d/10-durable-snapshotter.conf",
		"talos/Containerfile",
		"talos/manifest.yaml",
		"talos/rootfs/etc/cri/conf.d/10-durable-snapshotter.part",
		"talos/rootfs/usr/local/etc/containers/durable-snapshotter.yaml",
		container + "durable-snapshotter",
		container + "etc/durable-snapshotter/config.toml",
	}
	if !slices.Equal(files, want) {
		t.Errorf("the trees are\n%s\nwant\n%s", strings.Join(files, "\n"), strings.Join(want, "\n"))
	}
	talosService(t, out, container)
	var manifest struct {
		Version  string `json:"version"`
		Metadata struct {
			Name          string `json:"name"`
			Version       string `json:"version"`
			Author        string `json:"author"`
			Description   string `json:"description"`
			Compatibility struct {
				Talos struct {
					Version string `json:"version"`
				} `json:"talos"`
			} `json:"compatibility"`
		} `json:"metadata"`
	}
	check(t, strictly(must[[]byte](t)(os.ReadFile(filepath.Join(out, "talos/manifest.yaml"))), &manifest))
	if m := manifest.Metadata; manifest.Version != "v1alpha1" || m.Name != "durable-snapshotter" || m.Version != "v1.2.3" {
		t.Errorf("%+v", manifest)
	}
	part := read(t, "platforms/talos/cri.part")
	if _, name, _ := strings.Cut(read(t, "containerd/switch"), "version = 3\n"); part != read(t, "microk8s/register.v3.toml")+name {
		t.Errorf("cri.part is not the text of the other platforms:\n%s", part)
	}
	release := read(t, "platforms/flatcar/extension-release")
	if release != "ID=flatcar\nSYSEXT_LEVEL=1.0\n" {
		t.Errorf("extension-release: %q", release)
	}
}

// talosService: the extension service starts what is there, without the service cri.
func talosService(t *testing.T, out, container string) {
	t.Helper()
	var service struct {
		Name      string `json:"name"`
		Container struct {
			Entrypoint string   `json:"entrypoint"`
			Args       []string `json:"args"`
			Security   struct {
				WriteableRootfs   bool   `json:"writeableRootfs"`
				RootfsPropagation string `json:"rootfsPropagation"`
			} `json:"security"`
			Mounts []struct {
				Source      string   `json:"source"`
				Destination string   `json:"destination"`
				Type        string   `json:"type"`
				Options     []string `json:"options"`
			} `json:"mounts"`
		} `json:"container"`
		Depends []struct {
			Path string `json:"path"`
		} `json:"depends"`
		Restart string `json:"restart"`
	}
	check(t, strictly(must[[]byte](t)(os.ReadFile(filepath.Join(out, "talos/rootfs/usr/local/etc/containers/durable-snapshotter.yaml"))), &service))
	if info, err := os.Stat(filepath.Join(out, container, service.Container.Entrypoint)); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("the entrypoint %s: %v, %v", service.Container.Entrypoint, info, err)
	}
	if service.Container.Security.RootfsPropagation != "shared" || service.Restart != "always" {
		t.Errorf("%+v", service)
	}
	for _, m := range service.Container.Mounts {
		// The same path on both sides, as containerd gets it in answers.
		if m.Source != m.Destination || !slices.Contains(m.Options, "rshared") {
			t.Errorf("mount %+v", m)
		}
		if _, err := os.Stat(filepath.Join(out, container, m.Destination)); err != nil {
			t.Errorf("no mount point for %s: %v", m.Destination, err)
		}
	}
}
