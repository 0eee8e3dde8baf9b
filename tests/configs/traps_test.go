package configs

import (
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// trap is a mistake that the documentation warns of.
type trap struct {
	name  string
	from  string
	until string
	put   put
	// What comes of it: containerd does not start and logs refused; or it starts,
	// and CRI is down with this error; or the effect is that in want.
	refused string
	cri     string
	want    effect
	doctor  string // the cause that doctor names, where pods stay on overlayfs
}

var (
	onOverlayfs = effect{Snapshotter: "overlayfs", ImageFs: "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs", Pause: true, SystemdCgroup: true}
	onDurable   = effect{Snapshotter: "durable", ImageFs: durableDir, Pause: true, SystemdCgroup: true}
	lost        = effect{Snapshotter: "durable", ImageFs: durableDir}
)

var traps = []trap{
	{name: "text A appended to config default", from: "2.3.7", refused: "already exists",
		put: func(t *testing.T, m *machine, text map[string]string) []string {
			_, appended, _ := strings.Cut(text[textA], "version = 3\n")
			write(t, mainFile, version3Main(t, m)+appended)
			return nil
		}},
	{name: "text A in a template of k3s", from: "2.0.14", refused: "already exists",
		put: func(t *testing.T, m *machine, text map[string]string) []string {
			_, appended, _ := strings.Cut(text[textA], "version = 3\n")
			return render(t, m, 3, "{{ template \"base\" . }}\n"+appended, text)
		}},
	{name: "a drop-in that is not imported", from: "2.0.14", want: onOverlayfs, doctor: "is not imported by",
		put: func(t *testing.T, m *machine, text map[string]string) []string {
			write(t, mainFile, imports.ReplaceAllString(version3Main(t, m), ""))
			write(t, confd, text[textB])
			return nil
		}},
	{name: "version 2 without runtimes", from: "2.0.14", want: effect{Snapshotter: "overlayfs", ImageFs: onOverlayfs.ImageFs}, doctor: "no table containerd.runtimes",
		put: func(t *testing.T, m *machine, text map[string]string) []string {
			write(t, mainFile, imageBased+text[textC]+text[textD])
			return nil
		}},
	// Not a trap: what these releases do not know, they pass over.
	{name: "text A before 2.3", from: "2.0.14", until: "2.3.7", want: lost, put: whole(textA)},
	{name: "version 2 with empty runtimes", from: "debian", until: "2.0.14", cri: "no corresponding runtime",
		put: emptyRuntimes},
	{name: "version 2 with empty runtimes", from: "2.0.14", want: effect{Snapshotter: "durable", ImageFs: durableDir},
		put: emptyRuntimes},
	{name: "main file 2, drop-in 2", from: "1.7.35", until: "2.0.14", want: lost, put: pair(flatcarImports, dropInV2)},
	{name: "main file 2, drop-in 2", from: "2.0.14", until: "2.3.7", want: onDurable, put: pair(flatcarImports, dropInV2)},
	{name: "main file 2, drop-in 2", from: "2.3.7", want: onOverlayfs, doctor: "no table containerd.runtimes", put: pair(flatcarImports, dropInV2)},
	{name: "main file 2, drop-in 3", from: "1.7.35", until: "2.0.14", refused: "version", put: pair(flatcarImports, dropInV3)},
	{name: "main file 2, drop-in 3", from: "2.0.14", until: "2.3.7", want: lost, put: pair(flatcarImports, dropInV3)},
	{name: "main file 2, drop-in 3", from: "2.3.7", want: onDurable, put: pair(flatcarImports, dropInV3)},
	{name: "main file 3, drop-in 2", from: "2.0.14", want: onOverlayfs, doctor: "is of version 2, and ",
		put: func(t *testing.T, m *machine, text map[string]string) []string {
			return pair(text[textImports]+imports.ReplaceAllString(version3Main(t, m), ""), dropInV2)(t, m, text)
		}},
}

func emptyRuntimes(t *testing.T, m *machine, text map[string]string) []string {
	write(t, mainFile, imageBased+text[textC]+text[textD]+"[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes]\n")
	return nil
}

// flatcarImports is a main file of version 2 that imports conf.d.
var flatcarImports = "imports = [\"/etc/containerd/conf.d/*.toml\"]\n" + imageBasedRuntimes

func dropInV2(text map[string]string) string { return "version = 2\n" + text[textC] + text[textD] }
func dropInV3(text map[string]string) string { return text[textB] }

func pair(main string, dropIn func(map[string]string) string) put {
	return func(t *testing.T, m *machine, text map[string]string) []string {
		write(t, mainFile, strings.ReplaceAll(main, "PAUSE", pauseRef()))
		write(t, confd, dropIn(text))
		return nil
	}
}

// TestTraps makes the mistakes that the documentation warns of. It fails when a
// release of containerd does not punish one any more: then the warning is wrong.
func TestTraps(t *testing.T) {
	texts := documented(t)
	for _, c := range traps {
		for _, release := range kittest.Releases(quickReleases...) {
			if !kit.Since(release, c.from) || c.until != "" && kit.Since(release, c.until) {
				continue
			}
			t.Run(c.name+"/"+release, func(t *testing.T) {
				m := newMachine(t, release)
				args := c.put(t, m, texts)
				err := m.start(t, args...)
				switch {
				case c.refused != "":
					if err == nil || !strings.Contains(err.Error(), c.refused) {
						t.Errorf("containerd %s: %v, want that it does not start and logs %q", release, err, c.refused)
					}
					expectFinding(t, m.doctor(t, args), "containerd-config", c.refused)
				case err != nil:
					t.Error(err)
				case c.cri != "":
					if got := m.criError(t); !strings.Contains(got, c.cri) {
						t.Errorf("the CRI plugin's error is %q, want %q", got, c.cri)
					}
					expectFinding(t, m.doctor(t, args), "cri-snapshotter", c.cri)
				default:
					if got := m.observe(t); got != c.want {
						t.Errorf("the effect is %+v, want %+v", got, c.want)
					}
					if c.want.Snapshotter == "overlayfs" {
						expectFinding(t, m.doctor(t, args), "cri-snapshotter", c.doctor)
					}
				}
			})
		}
	}
}
