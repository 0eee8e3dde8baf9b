package deploy

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// The fields of monitoring.coreos.com that deploy uses; another one in a manifest is
// refused, until it is added here.
type podMonitor struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              struct {
		JobLabel            string               `json:"jobLabel"`
		Selector            metav1.LabelSelector `json:"selector"`
		PodMetricsEndpoints []struct {
			Port        string    `json:"port"`
			Interval    string    `json:"interval"`
			Relabelings []relabel `json:"relabelings"`
		} `json:"podMetricsEndpoints"`
	} `json:"spec"`
}

type relabel struct {
	SourceLabels []string `json:"sourceLabels,omitempty"`
	TargetLabel  string   `json:"targetLabel,omitempty"`
	Regex        string   `json:"regex,omitempty"`
	Replacement  string   `json:"replacement,omitempty"`
	Action       string   `json:"action,omitempty"`
}

type scrapeConfig struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              struct {
		ScrapeInterval      string `json:"scrapeInterval"`
		KubernetesSDConfigs []struct {
			Role      string `json:"role"`
			Selectors []struct {
				Role  string `json:"role"`
				Label string `json:"label"`
			} `json:"selectors"`
		} `json:"kubernetesSDConfigs"`
		Relabelings []relabel `json:"relabelings"`
	} `json:"spec"`
}

// groups is a rule file of Prometheus, too.
type groups struct {
	Groups []struct {
		Name  string `json:"name"`
		Rules []rule `json:"rules"`
	} `json:"groups"`
}

type rule struct {
	Alert       string            `json:"alert,omitempty"`
	Record      string            `json:"record,omitempty"`
	Expr        string            `json:"expr"`
	For         string            `json:"for,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

type prometheusRule struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              groups `json:"spec"`
}

func alerts(t *testing.T) []rule {
	t.Helper()
	var r prometheusRule
	check(t, strictly([]byte(read(t, "monitoring/rules.yaml")), &r))
	if len(r.Spec.Groups) != 1 || len(r.Spec.Groups[0].Rules) == 0 {
		t.Fatalf("%d groups of rules", len(r.Spec.Groups))
	}
	return r.Spec.Groups[0].Rules
}

// panel is a panel of the dashboard.
type panel struct {
	ID      int
	Title   string
	Type    string
	GridPos struct{ X, Y, W, H int }
	Targets []struct{ Expr string }
}

func panels(t *testing.T) []panel {
	t.Helper()
	var d struct{ Panels []panel }
	check(t, json.Unmarshal([]byte(read(t, "monitoring/dashboard.json")), &d))
	return d.Panels
}

// expressions are all PromQL of alerts and dashboard, by where they stand.
func expressions(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, a := range alerts(t) {
		all[a.Alert] = a.Expr
	}
	for _, p := range panels(t) {
		for i, target := range p.Targets {
			all[fmt.Sprintf("%s, %d", p.Title, i)] = target.Expr
		}
	}
	return all
}

var (
	metricName = regexp.MustCompile(`\b(?:durable_snapshotter|grpc_server|process|go)_\w+`)
	matcher    = regexp.MustCompile(`(\w+)\{([^}]*)\}`)
	values     = regexp.MustCompile(`\b(state|kind|depth|result|phase|action)=~?"([^"]*)"`)
)

// TestMetricsAreDocumented: what alerts and dashboard query is in the table of
// docs/operations.md, which a test of the program holds to the code, and so are the
// values of labels.
func TestMetricsAreDocumented(t *testing.T) {
	documented := map[string]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| `(\\w+)` \\| (\\w+) \\| (.*) \\|$").FindAllStringSubmatch(read(t, "../docs/operations.md"), -1) {
		documented[row[1]] = row[3]
		if row[2] == "histogram" {
			documented[row[1]+"_bucket"] = row[3]
		}
	}
	if len(documented) < 25 {
		t.Fatalf("only %d metrics were found in docs/operations.md", len(documented))
	}
	documented["process_start_time_seconds"] = "of client_golang, on every Unix"
	found := 0
	for where, expr := range expressions(t) {
		for _, name := range metricName.FindAllString(expr, -1) {
			if found++; documented[name] == "" {
				t.Errorf("%s: docs/operations.md has no metric %s", where, name)
			}
		}
		for _, m := range matcher.FindAllStringSubmatch(expr, -1) {
			for _, v := range values.FindAllStringSubmatch(m[2], -1) {
				for value := range strings.SplitSeq(v[2], "|") {
					if !regexp.MustCompile(`\b` + value + `\b`).MatchString(documented[m[1]]) {
						t.Errorf("%s: %s has no %s %q in docs/operations.md: %s", where, m[1], v[1], value, documented[m[1]])
					}
				}
			}
		}
	}
	if found < 30 {
		t.Errorf("only %d metrics were found", found)
	}
}

// TestRunbooks: each alert has a severity, and a section of docs/operations.md.
func TestRunbooks(t *testing.T) {
	doc := read(t, "../docs/operations.md")
	for _, a := range alerts(t) {
		if !slices.Contains([]string{"critical", "warning", "info"}, a.Labels["severity"]) || a.Annotations["summary"] == "" {
			t.Errorf("%s: labels %v, annotations %v", a.Alert, a.Labels, a.Annotations)
		}
		file, anchor, _ := strings.Cut(a.Annotations["runbook_url"], "#")
		if !strings.HasSuffix(file, "/docs/operations.md") || anchor != strings.ToLower(a.Alert) {
			t.Errorf("%s: runbook_url %q", a.Alert, a.Annotations["runbook_url"])
		}
		if _, section, ok := strings.Cut(doc, "\n### "+a.Alert+"\n"); !ok || len(strings.TrimSpace(section)) < 100 {
			t.Errorf("docs/operations.md has no section %s", a.Alert)
		}
	}
	for _, title := range regexp.MustCompile(`(?m)^### (Durable\w+)$`).FindAllStringSubmatch(doc, -1) {
		if !slices.ContainsFunc(alerts(t), func(r rule) bool { return r.Alert == title[1] }) {
			t.Errorf("docs/operations.md has a section on %s, which is no alert", title[1])
		}
	}
}

// TestDashboard: panels have queries, fit the page, and do not cover each other.
func TestDashboard(t *testing.T) {
	taken, ids := map[[2]int]string{}, map[int]bool{}
	all := panels(t)
	for _, p := range all {
		if p.Title == "" || len(p.Targets) == 0 || ids[p.ID] {
			t.Errorf("panel %d %q of type %q has %d queries, or a number that is taken", p.ID, p.Title, p.Type, len(p.Targets))
		}
		ids[p.ID] = true
		if p.GridPos.X+p.GridPos.W > 24 || p.GridPos.Y+p.GridPos.H > 40 {
			t.Errorf("%s does not fit the page: %+v", p.Title, p.GridPos)
		}
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other := taken[[2]int{x, y}]; other != "" {
					t.Fatalf("%s covers %s", p.Title, other)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
	}
	if len(all) < 15 {
		t.Errorf("only %d panels", len(all))
	}
}

// TestScrapeConfig: it has the fields of its kind, and gives the job its name.
func TestScrapeConfig(t *testing.T) {
	var s scrapeConfig
	check(t, strictly([]byte(read(t, "monitoring/scrapeconfig.yaml")), &s))
	if s.APIVersion != "monitoring.coreos.com/v1alpha1" || s.Kind != "ScrapeConfig" || s.Spec.KubernetesSDConfigs[0].Role != "Node" {
		t.Errorf("%+v", s)
	}
	if !slices.ContainsFunc(s.Spec.Relabelings, func(r relabel) bool { return r.TargetLabel == "job" && r.Replacement == "durable-snapshotter" }) {
		t.Error("alerts are about the job durable-snapshotter")
	}
}

// promtool runs Debian's promtool in a directory with the alerts in rules.yaml, and
// skips the test where it is missing.
func promtool(t *testing.T, files map[string][]byte, args ...string) (string, error) {
	t.Helper()
	tool, err := exec.LookPath("promtool")
	if err != nil {
		if tool, err = filepath.Abs("../.bin/promtool"); err == nil {
			_, err = os.Stat(tool)
		}
	}
	if err != nil {
		t.Skip("promtool is missing: make tests/.bin/promtool takes it from Debian's package prometheus")
	}
	dir := t.TempDir()
	for name, text := range files {
		check(t, os.WriteFile(filepath.Join(dir, name), text, 0o644))
	}
	cmd := exec.CommandContext(t.Context(), tool, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func ruleFile(t *testing.T, rules []rule) []byte {
	t.Helper()
	var g groups
	check(t, yaml.Unmarshal([]byte(`{groups: [{name: durable-snapshotter}]}`), &g))
	g.Groups[0].Rules = rules
	return must[[]byte](t)(yaml.Marshal(g))
}

// TestExpressions: promtool parses all PromQL of alerts and dashboard.
func TestExpressions(t *testing.T) {
	rules := alerts(t)
	variables := strings.NewReplacer("$__rate_interval", "5m", "$instance", ".*")
	for _, p := range panels(t) {
		for i, target := range p.Targets {
			rules = append(rules, rule{Record: fmt.Sprintf("panel:%d:%d", p.ID, i), Expr: variables.Replace(target.Expr)})
		}
	}
	if out, err := promtool(t, map[string][]byte{"rules.yaml": ruleFile(t, rules)}, "check", "rules", "rules.yaml"); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	rules[0].Expr += " ==="
	if out, err := promtool(t, map[string][]byte{"rules.yaml": ruleFile(t, rules)}, "check", "rules", "rules.yaml"); err == nil {
		t.Errorf("an expression that is none is accepted:\n%s", out)
	}
}

// TestAlerts: each alert fires on what it is for, and none on a healthy node. The
// cases are in testdata/alerts.yaml.
func TestAlerts(t *testing.T) {
	cases := must[[]byte](t)(os.ReadFile("testdata/alerts.yaml"))
	rules := alerts(t)
	for _, a := range rules {
		fires := regexp.MustCompile(`alertname: ` + a.Alert + `\n +exp_alerts:\n +- exp_labels:`)
		silent := regexp.MustCompile(`alertname: ` + a.Alert + `\n +exp_alerts: \[\]`)
		if !fires.Match(cases) || !silent.Match(cases) {
			t.Errorf("testdata/alerts.yaml has no case in which %s fires, or none in which it does not", a.Alert)
		}
	}
	files := map[string][]byte{"rules.yaml": ruleFile(t, rules), "alerts.yaml": cases}
	if out, err := promtool(t, files, "test", "rules", "alerts.yaml"); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	for i := range rules {
		rules[i].Expr = "vector(0) > 1"
	}
	files["rules.yaml"] = ruleFile(t, rules)
	if out, err := promtool(t, files, "test", "rules", "alerts.yaml"); err == nil {
		t.Errorf("with alerts that never fire, the cases pass:\n%s", out)
	}
}
