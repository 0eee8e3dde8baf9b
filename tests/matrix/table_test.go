package matrix

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/defects"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// job is a column of the table.
type job struct {
	name string
	do   func(testing.TB, *node)
}

var jobs = []job{
	{"pull", pulls},
	{"run", runs},
	{"power cut", survives},
	{"heal", heals},
	{"heal from a registry", fetchesTLS},
	{"the same without TLS", fetchesHTTP},
	{"repair", repairs},
	{"CRI", cri},
	{"disk figures", figures},
}

// rows are the releases, newest first, with what a reader knows them by.
var rows = []struct{ release, name string }{
	{kit.Current, kit.Current},
	{"2.3.7", "2.3.7"},
	{"2.2.9", "2.2.9"},
	{"2.1.9", "2.1.9"},
	{"2.0.14", "2.0.14"},
	{"1.7.35", "1.7.35"},
	{kit.Debian, "1.6.20 (Debian 12)"},
}

// note is why a job does not work on a release.
type note struct {
	text string
	seen string // matches the failure of the job
}

var notes = []note{
	{
		text: "Its transfer service connects by TLS only, to the host in the image's name, and reads no configuration of registries: no mirrors. " +
			"Where that fails the image is dropped, and the next pull fetches it. Cure: containerd 2.0, or an archive (`[heal] archives`).",
		seen: `Head \\*"https://127\.0\.0\.1[:/]`,
	},
	{
		text: "It has no transfer service, so nothing is fetched without a pull: the image is dropped, and the next pull fetches it. Cure: containerd 2.0, or an archive (`[heal] archives`).",
		seen: "unknown service containerd.services.transfer",
	},
	{
		text: "It does not know `exports`, so the kubelet gets the figures of a directory below `/var/lib/containerd`. They are right if that is on the same file system. Cure: containerd 1.6.32, or that file system.",
		seen: "io.containerd.snapshotter.v1.durable",
	},
}

// exceptions are the cells that do not work, with the number of the note, from 1.
var exceptions = map[[2]string]int{
	{"1.7.35", "the same without TLS"}:   1,
	{kit.Debian, "heal from a registry"}: 2,
	{kit.Debian, "the same without TLS"}: 2,
	{kit.Debian, "disk figures"}:         3,
}

// cell is what the table has for a job.
func cell(release, job string) string {
	if n := exceptions[[2]string{release, job}]; n > 0 {
		return fmt.Sprintf("no (%d)", n)
	}
	return "ok"
}

// table is in the form of README.md. A cell is what of returns; a row without cells is
// left out.
func table(of func(release, job string) string) string {
	var b strings.Builder
	b.WriteString("| containerd |")
	for _, j := range jobs {
		fmt.Fprintf(&b, " %s |", j.name)
	}
	b.WriteString("\n|---|" + strings.Repeat("---|", len(jobs)) + "\n")
	for _, r := range rows {
		line := ""
		for _, j := range jobs {
			if c := of(r.release, j.name); c != "" {
				line += fmt.Sprintf(" %s |", c)
			}
		}
		if line != "" {
			fmt.Fprintf(&b, "| %s |%s\n", r.name, line)
		}
	}
	return b.String()
}

// TestReadme: README.md has the table, and the notes.
func TestReadme(t *testing.T) {
	readme := string(must[[]byte](t)(os.ReadFile("../../README.md")))
	want := table(cell) + "\n"
	for i, n := range notes {
		want += fmt.Sprintf("%d. %s\n", i+1, n.text)
	}
	if !strings.Contains(readme, want) {
		t.Errorf("README.md does not have this table:\n%s", want)
	}
	for at, n := range exceptions {
		if !slices.ContainsFunc(rows, func(r struct{ release, name string }) bool { return r.release == at[0] }) ||
			!slices.ContainsFunc(jobs, func(j job) bool { return j.name == at[1] }) || n > len(notes) {
			t.Errorf("there is an exception for %q, which is no cell, or no note %d", at, n)
		}
	}
}

// TestMatrix runs all jobs on each release: without a choice, on the newest, and on the
// oldest with the same interfaces, which tests/configs compiles, too.
func TestMatrix(t *testing.T) {
	seen := map[[2]string]string{}
	for _, r := range rows {
		if !slices.Contains(kittest.Releases("2.0.14", kit.Current), r.release) {
			continue
		}
		t.Run(r.release, func(t *testing.T) {
			n := newNode(t, r.release, kit.DaemonOptions{})
			for _, j := range jobs {
				n.begin(t)
				failures := try(t, j.do, n)
				got, text := "ok", strings.Join(failures, "\n")
				if text != "" {
					got = "no: " + strings.ReplaceAll(text, "\n", " ")
					for i, note := range notes {
						if regexp.MustCompile(note.seen).MatchString(text) {
							got = fmt.Sprintf("no (%d)", i+1)
						}
					}
				}
				seen[[2]string{r.release, j.name}] = got
				if want := cell(r.release, j.name); got != want {
					t.Errorf("%s with containerd %s: %.200s, want %s\n%s", j.name, r.release, got, want, text)
				}
			}
		})
	}
	t.Logf("what was seen:\n%s", table(func(release, job string) string { return seen[[2]string{release, job}] }))
}

// TestPlanted: a daemon that does not sync does not survive the power cut.
func TestPlanted(t *testing.T) {
	binary := must[string](t)(defects.Build())
	n := newNode(t, kit.Current, kit.DaemonOptions{Binary: binary, Env: []string{defects.Activate("no-syncfs")}})
	n.begin(t)
	failures := strings.Join(try(t, survives, n), "\n")
	if !strings.Contains(failures, "the power cut has damaged a layer") {
		t.Errorf("the power cut was survived, or something else has failed: %q", failures)
	}
}
