package pulls

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/published"
)

const product = "../../.."

// others are the names of reports that are not on pulls.
var others = regexp.MustCompile(`^(paths|layers|boot)-`)

// committed are the reports on pulls in docs/bench, by name.
func committed(t *testing.T) map[string]*Report {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(product, "docs/bench/*.json"))
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]*Report{}
	for _, file := range files {
		if others.MatchString(filepath.Base(file)) {
			continue
		}
		r, err := Load(file)
		if err != nil {
			t.Fatal(err)
		}
		all[filepath.Base(file)] = r
	}
	return all
}

// TestMemory: in no pull of a report in docs/bench did the daemon have 150 MiB or more, also with
// three layers at a time.
func TestMemory(t *testing.T) {
	most := map[int]int64{} // by layers at a time
	for name, r := range committed(t) {
		for _, p := range r.Pulls {
			most[p.Unpacks] = max(most[p.Unpacks], p.DaemonMemory)
			if p.DaemonMemory >= 150*mib {
				t.Errorf("%s: %+v: %d MiB", name, p.Setting, p.DaemonMemory/mib)
			}
		}
	}
	if most[3] == 0 {
		t.Error("no report has pulls of three layers at a time")
	}
	t.Logf("at most, in bytes, by layers at a time: %v", most)
}

// TestDocuments: docs/performance.md has the table of each report in docs/bench as command bench
// makes it, and no other; the chart beside it is the report's.
func TestDocuments(t *testing.T) {
	reports := committed(t)
	document, err := os.ReadFile(filepath.Join(product, "docs/performance.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`<!-- bench table (\S+\.json) -->`).FindAllSubmatch(document, -1) {
		if reports[string(m[1])] == nil && !others.Match(m[1]) {
			t.Errorf("docs/performance.md has the table of %s, which is not in docs/bench", m[1])
		}
	}
	if len(reports) == 0 {
		t.Skip("docs/bench has no report yet: no figure is compared")
	}
	for name, r := range reports {
		if table, ok := published.TableIn(document, name); !ok || string(table) != r.Table() {
			t.Errorf("docs/performance.md lacks the table of %s, or has another one: in tests/, go run ./cmd/bench table --into ../docs/performance.md ../docs/bench/%s", name, name)
		}
		chart := strings.TrimSuffix(name, ".json") + ".svg"
		if text, err := os.ReadFile(filepath.Join(product, "docs/bench", chart)); err != nil || string(text) != r.Chart() {
			t.Errorf("docs/bench/%s is not the chart of %s (%v): in tests/, go run ./cmd/bench chart ../docs/bench/%s >../docs/bench/%s", chart, name, err, name, chart)
		}
		if r.Dirty {
			t.Errorf("%s was measured with a product that no revision has", name)
		}
	}
}

// TestReadme: the figures of README's row about the cost of a pull are ratios of a committed report.
func TestReadme(t *testing.T) {
	reports := committed(t)
	if len(reports) == 0 {
		t.Skip("docs/bench has no report yet: no figure is compared")
	}
	text, err := os.ReadFile(filepath.Join(product, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	row := regexp.MustCompile(`(?m)^\| a pull \|([^|]*)\|`).FindSubmatch(text)
	if row == nil {
		t.Fatal("README.md has no row about the cost of a pull")
	}
	for _, err := range unmeasured(string(row[1]), reports) {
		t.Error("README.md, the cost of a pull: ", err)
	}
}

// unmeasured lists the figures with a decimal point in a text that are not the median of the
// ratios of any row of a daemon, rounded to as many digits as the figure has.
func unmeasured(text string, reports map[string]*Report) (all []error) {
	figures := regexp.MustCompile(`\b\d+\.\d+\b`).FindAllString(text, -1)
	if len(figures) == 0 {
		all = append(all, fmt.Errorf("%q has no figure", text))
	}
	for _, figure := range figures {
		_, decimals, _ := strings.Cut(figure, ".")
		found := false
		for _, r := range reports {
			for _, row := range r.Rows() {
				v := Variants[max(0, place(row.Variant))]
				found = found || v.daemon && strconv.FormatFloat(row.Ratio.Median, 'f', len(decimals), 64) == figure
			}
		}
		if !found {
			all = append(all, fmt.Errorf("no report in docs/bench has the ratio %s", figure))
		}
	}
	return all
}

// TestUnmeasured: the comparison sees a figure that nothing has measured.
func TestUnmeasured(t *testing.T) {
	reports := map[string]*Report{"r.json": sample()}
	for text, want := range map[string]int{
		"0.60 times as long, in short 0.6": 0,
		"0.61 times":                       1,
		"0.6 to 0.7 times":                 1,
		"1.00 is the ratio of overlayfs":   1,
		"no figure at all":                 1,
	} {
		if got := unmeasured(text, reports); len(got) != want {
			t.Errorf("%q: %v, want %d", text, got, want)
		}
	}
}
