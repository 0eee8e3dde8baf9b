package packaging

import (
	"bytes"
	"crypto/sha256"
	"debug/buildinfo"
	"debug/elf"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestRelease: the tarball, the deb and the rpm have the same static program and the
// same files, the SBOM has each module of the program, and SHA256SUMS fits.
func TestRelease(t *testing.T) {
	onMachines(t)
	needs(t, "rpm")
	dir := release(t, "v1.2.0-rc.1-4-gabcdef0")
	command(t, "", nil, "sh", "-c", `cd "$1" && sha256sum --check --strict SHA256SUMS && test $(wc -l <SHA256SUMS) = 4`, "sh", dir)
	tarball, deb, rpm := the(t, dir+"/*.tar.gz"), the(t, dir+"/*.deb"), the(t, dir+"/*.rpm")
	if got := command(t, "", nil, "dpkg-deb", "-f", deb, "Version"); got != "1.2.0~rc.1+4.gabcdef0-1\n" {
		t.Errorf("version of the deb: %q", got)
	}
	if got := command(t, "", nil, "rpm", "-qp", "--qf", "%{VERSION}-%{RELEASE}", rpm); got != "1.2.0~rc.1+4.gabcdef0-1" {
		t.Errorf("version of the rpm: %q", got)
	}
	unpacked := func(file string, argv ...string) (root string) {
		root = kittest.Scratch(t)
		command(t, "", nil, append(argv, file, root)...)
		return root
	}
	fromDeb := unpacked(deb, "dpkg-deb", "-x")
	want := below(t, unpacked(tarball, "sh", "-c", `tar -C "$2" -xzf "$1"`, "sh"))
	if have := below(t, filepath.Join(fromDeb, "usr")); !maps.Equal(have, want) {
		t.Errorf("the deb has %v, the tarball %v", have, want)
	}
	if have := inRPM(t, rpm); !maps.Equal(have, want) {
		t.Errorf("the rpm has %v, the tarball %v", have, want)
	}
	program := filepath.Join(fromDeb, "usr/bin/durable-snapshotter")
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

// below lists the files below a prefix: mode, owner and digest. Where zsh finds its
// completions depends on the format, and the prefix in texts is taken for /usr.
func below(t *testing.T, prefix string) map[string]string {
	all := map[string]string{}
	check(t, filepath.WalkDir(prefix, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info := must[fs.FileInfo](t)(d.Info())
		text := must[[]byte](t)(os.ReadFile(path))
		if len(text) < 1<<16 {
			text = bytes.ReplaceAll(text, []byte("/usr/local/bin/"), []byte("/usr/bin/"))
		}
		all[place(strings.TrimPrefix(path, prefix+"/"))] = fmt.Sprintf("%#o %d %x", info.Mode().Perm(), info.Sys().(*syscall.Stat_t).Uid, sha256.Sum256(text))
		return nil
	}))
	if len(all) < 10 {
		t.Errorf("only %d files in %s", len(all), prefix)
	}
	return all
}

// place is the name of a file, without the directory where it is zsh's.
func place(name string) string {
	if strings.Contains(name, "/zsh/") {
		return filepath.Base(name)
	}
	return name
}

// inRPM is below for what an rpm has in /usr, without unpacking it: its names are
// absolute.
func inRPM(t *testing.T, file string) map[string]string {
	all := map[string]string{}
	for line := range strings.Lines(command(t, "", nil, "rpm", "-qp", "--dump", file)) {
		f := strings.Fields(line) // path, size, time, digest, mode, owner and others
		mode := must[uint64](t)(strconv.ParseUint(f[4], 8, 32))
		name, ok := strings.CutPrefix(f[0], "/usr/")
		if mode&syscall.S_IFMT != syscall.S_IFREG || !ok {
			continue
		}
		if f[5] != "root" {
			t.Errorf("%s belongs to %s", f[0], f[5])
		}
		all[place(name)] = fmt.Sprintf("%#o 0 %s", mode&0o777, f[3])
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
