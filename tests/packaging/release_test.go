package packaging

import (
	"debug/buildinfo"
	"debug/elf"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestRelease: the tarball, the deb and the rpm have the same static program and the
// same files, the SBOM has each module of the program, and SHA256SUMS fits.
func TestRelease(t *testing.T) {
	onMachines(t)
	needs(t, "rpm")
	needs(t, "rpm2cpio")
	needs(t, "cpio")
	dir := release(t, "v1.2.0-rc.1-4-gabcdef0")
	command(t, "", nil, "sh", "-c", `cd "$1" && sha256sum --check --strict SHA256SUMS && test $(wc -l <SHA256SUMS) = 4`, "sh", dir)
	tarball, deb, rpm := the(t, dir+"/*.tar.gz"), the(t, dir+"/*.deb"), the(t, dir+"/*.rpm")
	if got := command(t, "", nil, "dpkg-deb", "-f", deb, "Version"); got != "1.2.0~rc.1+4.gabcdef0-1\n" {
		t.Errorf("version of the deb: %q", got)
	}
	if got := command(t, "", nil, "rpm", "-qp", "--qf", "%{VERSION}-%{RELEASE}", rpm); got != "1.2.0~rc.1+4.gabcdef0-1" {
		t.Errorf("version of the rpm: %q", got)
	}
	roots := map[string]string{}
	for name, script := range map[string]string{
		"tar": `tar -C "$1" -xzf "$2"`, "deb": `dpkg-deb -x "$2" "$1" && mv "$1"/usr/* "$1"`, "rpm": `cd "$1"; rpm2cpio "$2" >cpio; cpio --extract --make-directories --no-absolute-filenames --quiet <cpio 2>/dev/null; rm cpio; mv usr/* .`,
	} {
		roots[name] = kittest.Scratch(t)
		command(t, "", nil, "sh", "-ec", script, "sh", roots[name], map[string]string{"tar": tarball, "deb": deb, "rpm": rpm}[name])
	}
	want := below(t, roots["tar"])
	for _, name := range []string{"deb", "rpm"} {
		if have := below(t, roots[name]); !maps.Equal(have, want) {
			t.Errorf("%s has %v, the tarball %v", name, have, want)
		}
	}
	program := filepath.Join(roots["deb"], "bin/durable-snapshotter")
	if out := command(t, "", nil, program, "version"); !strings.HasPrefix(out, "durable-snapshotter v1.2.0-rc.1-4-gabcdef0 tested ") {
		t.Errorf("version: %q", out)
	}
	binary := must[*elf.File](t)(elf.Open(program))
	defer binary.Close()
	for _, p := range binary.Progs {
		if p.Type == elf.PT_INTERP {
			t.Error("the program is not static")
		}
	}
	verifySBOM(t, the(t, dir+"/*.cdx.json"), program)
}

// below lists the files below a directory with their modes and digests. Where zsh finds
// its completions, and which prefix the units have, depends on the format.
func below(t *testing.T, dir string) map[string]string {
	all := map[string]string{}
	out := command(t, "", nil, "sh", "-ec", `cd "$1" && find . -type f -exec stat -c '%n %a %U' {} +`, "sh", dir)
	for line := range strings.Lines(out) {
		name, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		text := string(must[[]byte](t)(os.ReadFile(filepath.Join(dir, name))))
		if strings.Contains(name, "zsh") {
			name = filepath.Base(name)
		}
		if len(text) < 1<<16 {
			text = strings.ReplaceAll(text, "/usr/local/bin/", "/usr/bin/")
		}
		all[name] = rest + " " + command(t, text, nil, "sha256sum")
	}
	if len(all) < 10 {
		t.Errorf("only %d files in %s", len(all), dir)
	}
	return all
}

func verifySBOM(t *testing.T, file, program string) {
	var bom struct {
		BOMFormat, SpecVersion string
		Metadata               struct {
			Timestamp string
			Component struct {
				Version string
				Hashes  []struct{ Content string }
			}
		}
		Components []struct{ Name, Version, PURL string }
	}
	check(t, json.Unmarshal(must[[]byte](t)(os.ReadFile(file)), &bom))
	if bom.BOMFormat != "CycloneDX" || !regexp.MustCompile(`^1\.[0-9]+$`).MatchString(bom.SpecVersion) || bom.Metadata.Timestamp != "2023-11-14T22:13:20Z" {
		t.Errorf("SBOM: %s %s of %s", bom.BOMFormat, bom.SpecVersion, bom.Metadata.Timestamp)
	}
	sum, _, _ := strings.Cut(command(t, "", nil, "sha256sum", program), " ")
	if c := bom.Metadata.Component; c.Version != "v1.2.0-rc.1-4-gabcdef0" || len(c.Hashes) != 1 || c.Hashes[0].Content != sum {
		t.Errorf("SBOM: the program is %+v", c)
	}
	info := must[*buildinfo.BuildInfo](t)(buildinfo.ReadFile(program))
	want := []string{"pkg:golang/std@" + strings.TrimPrefix(info.GoVersion, "go")}
	for _, m := range info.Deps {
		want = append(want, "pkg:golang/"+m.Path+"@"+strings.ReplaceAll(m.Version, "+", "%2B"))
	}
	var have []string
	for _, c := range bom.Components {
		have = append(have, c.PURL)
	}
	if slices.Sort(want); !slices.Equal(want, slices.Sorted(slices.Values(have))) || len(want) < 20 {
		t.Errorf("SBOM has %q, the program %q", have, want)
	}
}
