package configs

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// whole makes a text the main file.
func whole(key string) put {
	return func(t *testing.T, m *machine, text map[string]string) []string {
		write(t, mainFile, text[key])
		return nil
	}
}

func wholeV4(t *testing.T, m *machine, text map[string]string) []string {
	write(t, mainFile, strings.Replace(text[textA], "version = 3", "version = 4", 1))
	return nil
}

// dropIn puts a text beside the main file that the release itself prints.
func dropIn(key string) put {
	return func(t *testing.T, m *machine, text map[string]string) []string {
		write(t, mainFile, version3Main(t, m))
		write(t, confd, text[key])
		return nil
	}
}

// dropInImports is dropIn with a main file that does not import conf.d, until the
// documented line is in it.
func dropInImports(key string) put {
	return func(t *testing.T, m *machine, text map[string]string) []string {
		main := imports.ReplaceAllString(version3Main(t, m), "")
		write(t, mainFile, text[textImports]+main)
		write(t, confd, text[key])
		return nil
	}
}

var imports = regexp.MustCompile(`(?m)^ *imports = .*\n`)

// version3Main is what the release prints, with what kubeadm's instructions
// change in it: the pause image and the cgroup driver.
func version3Main(t *testing.T, m *machine) string {
	t.Helper()
	text := m.configDefault(t)
	text = set(t, text, `plugins."io.containerd.cri.v1.images".pinned_images`, "sandbox", "'"+pauseRef()+"'")
	return set(t, text, `plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options`, "SystemdCgroup", "true")
}

const criV2 = `plugins."io.containerd.grpc.v1.cri"`

// version2Main is version3Main for a release before 2.0.
func version2Main(t *testing.T, m *machine) string {
	t.Helper()
	text := m.configDefault(t)
	text = set(t, text, criV2, "sandbox_image", `"`+pauseRef()+`"`)
	return set(t, text, criV2+".containerd.runtimes.runc.options", "SystemdCgroup", "true")
}

// version2Own edits the file that the release prints.
func version2Own(t *testing.T, m *machine, text map[string]string) []string {
	write(t, mainFile, editVersion2(t, version2Main(t, m), text))
	return nil
}

// version2Default edits the file that 1.7 prints, which is also what a node has
// that was upgraded to 2.x since.
func version2Default(t *testing.T, m *machine, text map[string]string) []string {
	old := &machine{bins: kittest.Release(t, "1.7.35"), release: "1.7.35"}
	write(t, mainFile, editVersion2(t, version2Main(t, old), text))
	return nil
}

// version2 edits a given file.
func version2(main string) put {
	return func(t *testing.T, m *machine, text map[string]string) []string {
		write(t, mainFile, editVersion2(t, strings.ReplaceAll(main, "PAUSE", pauseRef()), text))
		return nil
	}
}

// withText appends a text to the main file that another put has written.
func withText(key string, main put) put {
	return func(t *testing.T, m *machine, text map[string]string) []string {
		args := main(t, m, text)
		written := must[[]byte](t)(os.ReadFile(mainFile))
		write(t, mainFile, string(written)+text[key])
		return args
	}
}

// dropInList is two drop-ins: the differ, and the list that begins with it.
func dropInList(t *testing.T, m *machine, text map[string]string) []string {
	write(t, filepath.Join(filepath.Dir(confd), filepath.Base(textList)), text[textList])
	return dropIn(textDiffer)(t, m, text)
}

// version2Differ edits the file that 1.7 prints, which has the table of the diff service.
func version2Differ(t *testing.T, m *machine, text map[string]string) []string {
	const list = `plugins."io.containerd.service.v1.diff-service"`
	proxy, _, _ := strings.Cut(text[textF], "["+list+"]")
	main := set(t, editVersion2(t, version2Main(t, m), text), list, "default", `["durable-diff", "walking"]`)
	write(t, mainFile, main+proxy)
	return nil
}

// editVersion2 does what the section on version 2 instructs the reader to do.
func editVersion2(t *testing.T, main string, text map[string]string) string {
	t.Helper()
	var containerd, runtimes bool
	for line := range strings.Lines(main) {
		name, _ := table(line)
		containerd = containerd || name == criV2+".containerd"
		runtimes = runtimes || strings.HasPrefix(name, criV2+".containerd.runtimes")
	}
	edited := main + text[textC]
	if containerd {
		edited = set(t, edited, criV2+".containerd", "snapshotter", `"durable"`)
	} else {
		edited += text[textD]
	}
	if !runtimes {
		edited += text[textE]
	}
	return edited
}

// imageBased has the tables of the file that Home Assistant OS ships.
const imageBased = `version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = []

[plugins."io.containerd.internal.v1.opt"]
  path = "/opt/containerd"
`

// imageBasedRuntimes has those of Flatcar's.
const imageBasedRuntimes = `version = 2
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
address = "/run/containerd/containerd.sock"

[plugins."io.containerd.grpc.v1.cri"]
enable_selinux = false
sandbox_image = "PAUSE"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = true
`
