package configs

import (
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// render writes containerd's configuration as k3s does, from a user's template.
func render(t *testing.T, m *machine, version int, user string, text map[string]string) []string {
	t.Helper()
	write(t, "/etc/durable-snapshotter/config.toml", text[textDurable])
	snapshotter := ""
	for line := range strings.Lines(text[textYAML]) {
		if v, ok := strings.CutPrefix(line, "snapshotter: "); ok {
			snapshotter = strings.TrimSpace(v)
		}
	}
	n := kit.K3sNode{Snapshotter: snapshotter, Pause: pauseRef()}
	write(t, kit.K3sDir+"/config.toml", must[string](t)(n.Render(version, user)))
	m.socket = kit.K3sSocket
	return kit.K3sArgs
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
