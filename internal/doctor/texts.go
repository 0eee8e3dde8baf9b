package doctor

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/durable-snapshotter/durable-snapshotter/docs"
)

// platforms maps what --print-config takes to the first lines of the texts in
// docs/containerd.md, without the comment sign.
var platforms = map[string][]string{
	"containerd-2":   {"/etc/containerd/conf.d/durable.toml, containerd 2.3 and newer"},
	"containerd-2.0": {"/etc/containerd/conf.d/durable.toml, containerd 2.0 to 2.2"},
	"containerd-1.7": {
		"/etc/containerd/config.toml of version 2, text C", "/etc/containerd/config.toml of version 2, text D", "/etc/containerd/config.toml of version 2, text E",
	},
	"containerd-2-differ": {"/etc/containerd/conf.d/durable.toml, containerd 2.3 and newer, with the differ", "/etc/containerd/conf.d/durable-diff.toml"},
	"containerd-1.7-differ": {
		"/etc/containerd/config.toml of version 2, text C", "/etc/containerd/config.toml of version 2, text D", "/etc/containerd/config.toml of version 2, text E", "/etc/containerd/config.toml of version 2, text F",
	},
	"k3s":      {"/etc/rancher/k3s/config.yaml", "/var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.d/durable.toml", "/etc/durable-snapshotter/config.toml on k3s"},
	"rke2":     {"/etc/rancher/rke2/config.yaml", "/var/lib/rancher/rke2/agent/etc/containerd/config-v3.toml.d/durable.toml", "/etc/durable-snapshotter/config.toml on RKE2"},
	"k0s":      {"/etc/k0s/containerd.d/durable.toml", "/etc/durable-snapshotter/config.toml on k0s"},
	"microk8s": {"/var/snap/microk8s/current/args/containerd-template.toml, at its end", "/etc/durable-snapshotter/config.toml on MicroK8s"},
	"talos":    {"/etc/cri/conf.d/20-durable.part"},
	"docker":   {"/etc/containerd/conf.d/durable.toml, for Docker and BuildKit", "/etc/docker/daemon.json"},
	"buildkit": {"/etc/containerd/conf.d/durable.toml, for Docker and BuildKit", "/etc/buildkit/buildkitd.toml"},
}

// Platforms are the names that [PlatformText] takes, sorted.
func Platforms() (all []string) {
	for name := range platforms {
		all = append(all, name)
	}
	slices.Sort(all)
	return all
}

// ErrPlatform means that there is no text for a platform, or for a file of it.
var ErrPlatform = errors.New("unknown platform")

// PlatformText is what is to be written into the files of a platform, as the documentation has it,
// or into one of them when its name is not empty.
func PlatformText(name, file string) (string, error) {
	keys, ok := platforms[name]
	if !ok {
		return "", fmt.Errorf("%w %q: there are %s", ErrPlatform, name, strings.Join(Platforms(), ", "))
	}
	texts, parts, files := Texts(docs.Containerd), []string{}, []string{}
	for _, key := range keys {
		text := texts[key]
		if text == "" {
			return "", fmt.Errorf("docs/containerd.md has no text %q", key)
		}
		goes := strings.TrimSuffix(strings.Fields(key)[0], ",")
		if files = append(files, goes); file == "" || file == goes {
			parts = append(parts, text)
		}
	}
	if len(parts) == 0 {
		return "", fmt.Errorf("%w: no text of %s is for %q: there are %s", ErrPlatform, name, file, strings.Join(slices.Compact(files), ", "))
	}
	return strings.Join(parts, "\n"), nil
}

// Texts are the fenced texts of a document by their first lines, which are comments that name where
// each goes.
func Texts(document string) map[string]string {
	texts := map[string]string{}
	var text strings.Builder
	inside := false
	for line := range strings.Lines(document) {
		fence := strings.TrimSuffix(line, "\n")
		switch {
		case !inside && slices.Contains([]string{"```toml", "```yaml", "```jsonc"}, fence):
			inside = true
			text.Reset()
		case inside && fence == "```":
			inside = false
			first, _, _ := strings.Cut(text.String(), "\n")
			_, key, _ := strings.Cut(first, " ")
			texts[key] = text.String()
		case inside:
			text.WriteString(line)
		}
	}
	return texts
}
