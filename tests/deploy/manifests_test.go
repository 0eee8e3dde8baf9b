package deploy

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/json"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"
)

var platforms = []string{"containerd", "k3s", "rke2", "k0s", "microk8s"}

// combinations are components that go onto a platform.
var combinations = [][]string{
	nil, {"stages/register"}, {"stages/switch"}, {"stages/switch", "monitoring"}, {"uninstall/back"}, {"uninstall/remove"},
}

// built is what kubectl would apply, each document in the type of its kind.
type built struct {
	DaemonSets []*appsv1.DaemonSet
	Jobs       []*batchv1.Job
	Namespaces []*corev1.Namespace
	ConfigMaps map[string]*corev1.ConfigMap
	Monitors   []*podMonitor
	Rules      []*prometheusRule
}

// podSpecs are those of everything that runs pods.
func (b *built) podSpecs() (all []corev1.PodSpec) {
	for _, d := range b.DaemonSets {
		all = append(all, d.Spec.Template.Spec)
	}
	for _, j := range b.Jobs {
		all = append(all, j.Spec.Template.Spec)
	}
	return all
}

// add decodes a document, and refuses a field that its kind does not have.
func (b *built) add(text []byte) error {
	var head struct{ APIVersion, Kind string }
	if err := yaml.Unmarshal(text, &head); err != nil {
		return err
	}
	switch head.APIVersion + " " + head.Kind {
	case "apps/v1 DaemonSet":
		return appended(&b.DaemonSets, text)
	case "batch/v1 Job":
		return appended(&b.Jobs, text)
	case "v1 Namespace":
		return appended(&b.Namespaces, text)
	case "v1 ConfigMap":
		var all []*corev1.ConfigMap
		if err := appended(&all, text); err != nil {
			return err
		}
		b.ConfigMaps[all[0].Name] = all[0]
		return nil
	case "monitoring.coreos.com/v1 PodMonitor":
		return appended(&b.Monitors, text)
	case "monitoring.coreos.com/v1 PrometheusRule":
		return appended(&b.Rules, text)
	}
	return fmt.Errorf("a document of a kind that nothing here is to be: %+v", head)
}

func appended[T any](all *[]*T, text []byte) error {
	v := new(T)
	*all = append(*all, v)
	return strictly(text, v)
}

// strictly decodes as an API server validates strictly: no field that is unknown or stands
// there twice, and no other case.
func strictly(text []byte, v any) error {
	data, err := yaml.YAMLToJSONStrict(text)
	if err != nil {
		return err
	}
	unknown, err := json.UnmarshalStrict(data, v)
	return errors.Join(append(unknown, err)...)
}

// build runs kustomize on a platform, with components in its kustomization.yaml, where an
// administrator writes them.
func build(t *testing.T, platform string, components ...string) *built {
	t.Helper()
	disk := filesys.MakeFsInMemory()
	check(t, filepath.WalkDir(deployed, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		return disk.WriteFile(path.Join("/deploy", strings.TrimPrefix(name, deployed)), text)
	}))
	if len(components) > 0 {
		text := read(t, platform, "kustomization.yaml") + "components:\n- ../" + strings.Join(components, "\n- ../") + "\n"
		check(t, disk.WriteFile(path.Join("/deploy", platform, "kustomization.yaml"), []byte(text)))
	}
	resources, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(disk, path.Join("/deploy", platform))
	check(t, err)
	b := &built{ConfigMaps: map[string]*corev1.ConfigMap{}}
	for _, r := range resources.Resources() {
		if err := b.add(must[[]byte](t)(r.AsYAML())); err != nil {
			t.Errorf("%s: %v", r.CurId(), err)
		}
	}
	return b
}

// TestManifests builds every platform with every stage.
func TestManifests(t *testing.T) {
	for _, platform := range platforms {
		for _, components := range combinations {
			t.Run(strings.Join(append([]string{platform}, components...), ","), func(t *testing.T) {
				b := build(t, platform, components...)
				b.consistent(t)
				stage := "install"
				for _, c := range components {
					if s, ok := strings.CutPrefix(c, "stages/"); ok {
						stage = s
					}
				}
				if len(components) > 0 && strings.HasPrefix(components[0], "uninstall/") {
					b.wayBack(t, path.Base(components[0]))
					return
				}
				if len(b.DaemonSets) != 1 || len(b.Jobs) != 0 {
					t.Fatalf("%d DaemonSets and %d Jobs, want one and none", len(b.DaemonSets), len(b.Jobs))
				}
				installs(t, b.DaemonSets[0], stage)
				if monitored := slices.Contains(components, "monitoring"); (len(b.Monitors) == 1) != monitored || (len(b.Rules) == 1) != monitored {
					t.Errorf("%d PodMonitors and %d PrometheusRules", len(b.Monitors), len(b.Rules))
				} else if monitored {
					b.scraped(t)
				}
			})
		}
	}
}

// consistent: what pods refer to is there, and they pull nothing but the placeholder.
func (b *built) consistent(t *testing.T) {
	t.Helper()
	for _, spec := range b.podSpecs() {
		volumes := map[string]bool{}
		for _, v := range spec.Volumes {
			volumes[v.Name] = true
			if v.ConfigMap != nil && b.ConfigMaps[v.ConfigMap.Name] == nil {
				t.Errorf("volume %s: no ConfigMap %s in %q", v.Name, v.ConfigMap.Name, slices.Collect(maps.Keys(b.ConfigMaps)))
			}
		}
		if !spec.HostPID || spec.AutomountServiceAccountToken == nil || *spec.AutomountServiceAccountToken {
			t.Error("the pod must see the processes of the host, and needs no token")
		}
		for _, c := range spec.Containers {
			for _, m := range c.VolumeMounts {
				if !volumes[m.Name] {
					t.Errorf("container %s: no volume %s", c.Name, m.Name)
				}
			}
			for _, from := range c.EnvFrom {
				if from.ConfigMapRef == nil || b.ConfigMaps[from.ConfigMapRef.Name] == nil {
					t.Errorf("container %s: no settings %+v", c.Name, from)
					continue
				}
				knownToScript(t, b.ConfigMaps[from.ConfigMapRef.Name].Data)
			}
			if c.Image != "registry.example.com/durable-snapshotter-node:latest" {
				t.Errorf("image %q: not the placeholder of deploy/README.md", c.Image)
			}
			if c.Lifecycle != nil {
				t.Errorf("container %s does something at its start or end: %+v", c.Name, c.Lifecycle)
			}
		}
	}
}

// knownToScript: a setting with a misspelt name would be without effect.
func knownToScript(t *testing.T, settings map[string]string) {
	t.Helper()
	known := map[string]bool{}
	for _, name := range regexp.MustCompile(`"\$\{([A-Z_]+)=`).FindAllStringSubmatch(read(t, "base/node.sh"), -1) {
		known[name[1]] = true
	}
	for name := range settings {
		if !known[name] {
			t.Errorf("node.sh does not know the setting %s", name)
		}
	}
}

// installs: one node at a time, in the stage, without an effect of the pod's end.
func installs(t *testing.T, d *appsv1.DaemonSet, stage string) {
	t.Helper()
	rolling := d.Spec.UpdateStrategy.RollingUpdate
	if d.Spec.UpdateStrategy.Type != appsv1.RollingUpdateDaemonSetStrategyType || rolling == nil || rolling.MaxUnavailable.String() != "1" {
		t.Errorf("update strategy %+v: want one node at a time", d.Spec.UpdateStrategy)
	}
	c := d.Spec.Template.Spec.Containers[0]
	if got := strings.Join(c.Command, " "); got != "/bin/sh /script/node.sh install" || len(c.Args) > 0 {
		t.Errorf("the pod runs %q %q", got, c.Args)
	}
	if c.ReadinessProbe == nil || c.LivenessProbe != nil {
		t.Error("the next node waits for readiness, and no pod is to be killed")
	}
	for _, e := range c.Env {
		if e.Name == "STAGE" && e.Value != stage {
			t.Errorf("stage %q, want %q", e.Value, stage)
		}
		knownToScript(t, map[string]string{e.Name: e.Value})
	}
}

func (b *built) wayBack(t *testing.T, verb string) {
	t.Helper()
	if len(b.DaemonSets) != 0 || len(b.Jobs) != 1 {
		t.Fatalf("%d DaemonSets and %d Jobs, want none and one", len(b.DaemonSets), len(b.Jobs))
	}
	spec := b.Jobs[0].Spec.Template.Spec
	if got := strings.Join(spec.Containers[0].Command, " "); got != "/bin/sh /script/node.sh "+verb || spec.NodeName != "NODE" || *b.Jobs[0].Spec.BackoffLimit != 0 {
		t.Errorf("%q on %q, tried again %d times", got, spec.NodeName, *b.Jobs[0].Spec.BackoffLimit)
	}
}

// scraped: the PodMonitor selects the pods, and their port is that of the daemon.
func (b *built) scraped(t *testing.T) {
	t.Helper()
	d, m := b.DaemonSets[0], b.Monitors[0]
	for name, value := range m.Spec.Selector.MatchLabels {
		if d.Spec.Template.Labels[name] != value {
			t.Errorf("the PodMonitor selects %s=%s, and the pods have %v", name, value, d.Spec.Template.Labels)
		}
	}
	if job := d.Spec.Template.Labels[m.Spec.JobLabel]; job != "durable-snapshotter" {
		t.Errorf("the job is %q, and alerts are about durable-snapshotter", job)
	}
	spec := d.Spec.Template.Spec
	c := spec.Containers[0]
	if !spec.HostNetwork || len(c.Ports) != 1 || c.Ports[0].Name != m.Spec.PodMetricsEndpoints[0].Port {
		t.Fatalf("host network: %v; ports %+v", spec.HostNetwork, c.Ports)
	}
	at := slices.IndexFunc(c.Env, func(e corev1.EnvVar) bool { return e.Name == "METRICS_ADDRESS" })
	if at < 0 || c.Env[at].Value != fmt.Sprintf(":%d", c.Ports[0].ContainerPort) {
		t.Errorf("the daemon serves metrics at %+v, and port %d is scraped", c.Env, c.Ports[0].ContainerPort)
	}
}

// TestStrict: the decoding above refuses what a cluster would drop or refuse.
func TestStrict(t *testing.T) {
	for _, c := range []struct{ file, old, wrong string }{
		{"base/daemonset.yaml", "hostPID: true", "hostPid: true"},
		{"base/daemonset.yaml", "maxUnavailable: 1", "maxUnavailabel: 1"},
		{"uninstall/back/job.yaml", "backoffLimit: 0", "backOffLimit: none"},
		{"monitoring/podmonitor.yaml", "jobLabel:", "joblabels:"},
		{"monitoring/rules.yaml", "expr:", "expression:"},
	} {
		text := read(t, c.file)
		if !strings.Contains(text, c.old) {
			t.Fatalf("%s has no %q", c.file, c.old)
		}
		b := &built{ConfigMaps: map[string]*corev1.ConfigMap{}}
		check(t, b.add([]byte(text)))
		if err := b.add([]byte(strings.Replace(text, c.old, c.wrong, 1))); err == nil {
			t.Errorf("%s with %q is accepted", c.file, c.wrong)
		}
	}
}

// TestPlatformTexts: the text that registers the snapshotter, which package configs
// starts, is the same on every platform.
func TestPlatformTexts(t *testing.T) {
	want := read(t, "containerd/register.toml")
	for _, platform := range []string{"k3s", "rke2", "k0s"} {
		if got := read(t, platform, "register.toml"); got != want {
			t.Errorf("%s/register.toml is another text:\n%s", platform, got)
		}
	}
	if strings.Contains(want, "cri") {
		t.Errorf("registering is not to touch the CRI plugin:\n%s", want)
	}
	_, tables, ok := strings.Cut(want, "version = 3\n")
	if got := read(t, "microk8s/register.v3.toml"); !ok || got != tables {
		t.Errorf("microk8s/register.v3.toml is another text:\n%s", got)
	}
	if got := strings.ReplaceAll(read(t, "microk8s/register.v2.toml"), `"`, "'"); got != strings.ReplaceAll(tables, `"`, "'") {
		t.Errorf("microk8s/register.v2.toml is another text:\n%s", got)
	}
	if read(t, "containerd/switch") != read(t, "k0s/switch") || read(t, "k3s/switch") != read(t, "rke2/switch") {
		t.Error("the texts that switch differ between platforms of one kind")
	}
}
