package configs

import (
	"os"
	"slices"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// quickReleases suffice to start every text once, in each of its places.
var quickReleases = []string{kit.Debian, "1.7.35", "2.0.14", kit.Current}

// Names of the texts, which are their first lines.
const (
	textA       = "/etc/containerd/conf.d/durable.toml, containerd 2.3 and newer"
	textB       = "/etc/containerd/conf.d/durable.toml, containerd 2.0 to 2.2"
	textC       = "/etc/containerd/config.toml of version 2, text C"
	textD       = "/etc/containerd/config.toml of version 2, text D"
	textE       = "/etc/containerd/config.toml of version 2, text E"
	textF       = "/etc/containerd/config.toml of version 2, text F"
	textDiffer  = "/etc/containerd/conf.d/durable.toml, containerd 2.3 and newer, with the differ"
	textList    = "/etc/containerd/conf.d/durable-diff.toml"
	textImports = "/etc/containerd/config.toml, at the top level"
	textDurable = "/etc/durable-snapshotter/config.toml on k3s"
	textYAML    = "/etc/rancher/k3s/config.yaml"
	textDropin  = kit.K3sDir + "/config-v3.toml.d/durable.toml"
	textTmplV3  = kit.K3sDir + "/config-v3.toml.tmpl"
	textTmplV2  = kit.K3sDir + "/config.toml.tmpl"

	textRKE2YAML    = "/etc/rancher/rke2/config.yaml"
	textRKE2Dropin  = "/var/lib/rancher/rke2/agent/etc/containerd/config-v3.toml.d/durable.toml"
	textRKE2Durable = "/etc/durable-snapshotter/config.toml on RKE2"
	textK0s         = "/etc/k0s/containerd.d/durable.toml"
	textK0sDurable  = "/etc/durable-snapshotter/config.toml on k0s"
	textMicroK8s    = "/var/snap/microk8s/current/args/containerd-template.toml, at its end"
	textMicroK8sDur = "/etc/durable-snapshotter/config.toml on MicroK8s"
	textTalos       = "/etc/cri/conf.d/20-durable.part"
	textDocker      = "/etc/containerd/conf.d/durable.toml, for Docker and BuildKit"
	textDaemonJSON  = "/etc/docker/daemon.json"
	textBuildkitd   = "/etc/buildkit/buildkitd.toml"
)

// put writes the files of a node, documented texts among them, and returns the
// arguments of its containerd.
type put func(t *testing.T, m *machine, text map[string]string) (args []string)

// place is a node that a text is for.
type place struct {
	name  string
	from  string // the first release that has this
	until string // the first one that has it no more; empty: all have it
	texts []string
	put   put
	// kept reports that the main file has a pause image and SystemdCgroup, which must
	// survive.
	kept bool
}

var places = []place{
	{"text A, no main file", "2.3.7", "", []string{textA}, whole(textA), false},
	{"text A, no main file, version 4", "2.3.7", "", []string{textA}, wholeV4, false},
	{"text A, config default", "2.3.7", "", []string{textA}, dropIn(textA), true},
	{"text A, main file without imports", "2.3.7", "", []string{textA, textImports}, dropInImports(textA), true},
	{"text B, no main file", "2.0.14", "2.3.7", []string{textB}, whole(textB), false},
	{"text B, config default that imports", "2.2.9", "2.3.7", []string{textB}, dropIn(textB), true},
	{"text B, main file without imports", "2.0.14", "2.3.7", []string{textB, textImports}, dropInImports(textB), true},
	{"version 2, no main file", "debian", "2.0.14", []string{textC, textD, textE}, version2("version = 2\n"), false},
	{"version 2, config default of 1.7", "1.7.35", "", []string{textC}, version2Default, true},
	{"version 2, config default", "debian", "1.7.35", []string{textC}, version2Own, true},
	{"version 2, no table containerd, no runtimes", "debian", "", []string{textC, textD, textE}, version2(imageBased), false},
	{"version 2, no table containerd, with runtimes", "debian", "", []string{textC, textD}, version2(imageBasedRuntimes), true},
	{"with the differ", "2.3.7", "", []string{textDiffer}, dropIn(textDiffer), true},
	{"with the differ, everywhere", "2.3.7", "", []string{textDiffer, textList}, dropInList, true},
	{"version 2, with the differ", "1.7.35", "2.0.14", []string{textC, textD, textE, textF}, withText(textF, version2("version = 2\n")), false},
	{"version 2, config default of 1.7, with the differ", "1.7.35", "2.0.14", []string{textC, textF}, version2Differ, true},
	{"k3s, drop-in", "2.0.14", "", []string{textYAML, textDurable, textDropin}, k3sDropIn, true},
	{"k3s, template of version 3", "2.0.14", "", []string{textYAML, textDurable, textTmplV3}, k3sTemplate(3, textTmplV3), true},
	{"k3s, template of version 2", "1.7.35", "", []string{textYAML, textDurable, textTmplV2}, k3sTemplate(2, textTmplV2), true},
	{"RKE2, drop-in", "2.0.14", "", []string{textRKE2YAML, textRKE2Durable, textRKE2Dropin}, rke2DropIn, true},
	{"k0s", "2.0.14", "", []string{textK0s, textK0sDurable}, k0s, true},
	{"MicroK8s", "1.7.35", "", []string{textMicroK8s, textMicroK8sDur}, microK8s, true},
	{"Talos", "2.0.14", "", []string{textTalos}, talos, true},
}

// elsewhere are texts that TestPrograms reads: textDocker for a containerd without the CRI plugin,
// the others for programs that are not here.
var elsewhere = map[string]bool{textDocker: true, textDaemonJSON: true, textBuildkitd: true}

// TestTexts starts every text in every place that it is for, and queries the
// running containerd for the effect.
func TestTexts(t *testing.T) {
	texts := documented(t)
	started := map[string]bool{}
	for place, c := range places {
		for _, key := range c.texts {
			if texts[key] == "" {
				t.Fatalf("no text %q in the documentation", key)
			}
		}
		releases := slices.DeleteFunc(slices.Clone(kittest.Releases(quickReleases...)), func(release string) bool {
			return !kit.Since(release, c.from) || c.until != "" && kit.Since(release, c.until)
		})
		for i, release := range releases {
			// make test starts the oldest of them and the newest, in turn.
			if i != (len(releases)-1)*(place%2) && os.Getenv(kittest.ReleasesVar) == "" {
				continue
			}
			for _, key := range c.texts {
				started[key] = true
			}
			t.Run(c.name+"/"+release, func(t *testing.T) {
				m := newMachine(t, release)
				args := c.put(t, m, texts)
				check(t, m.start(t, args...))
				want := effect{Snapshotter: "durable", ImageFs: durableDir, Pause: c.kept, SystemdCgroup: c.kept}
				if release == kit.Debian {
					want.ImageFs = "/var/lib/containerd/io.containerd.snapshotter.v1.durable" // it does not know exports
				}
				if got := m.observe(t); got != want {
					t.Errorf("the effect is %+v, want %+v", got, want)
				}
				m.expectProxy(t, texts, c.texts)
				if found := m.doctor(t, args); len(found) > 0 {
					t.Errorf("doctor finds %+v", found)
				}
				m.pullWithCtr(t, "durable")
				m.pullWithCtr(t, "overlayfs")
				if differ := slices.Contains(c.texts, textDiffer) || slices.Contains(c.texts, textF); differ != m.byDiffer(t) {
					t.Errorf("the differ has extracted layers: %v", !differ)
				}
			})
		}
	}
	for key := range texts {
		if !started[key] && !elsewhere[key] && os.Getenv(kittest.ReleasesVar) == "" {
			t.Errorf("no test starts the text %q", key)
		}
	}
}
