package packaging

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// help is the usage text of the program.
func help(t *testing.T) string { return command(t, "", nil, kittest.Binaries(t).Daemon, "help") }

// TestGenerated: the manual page and the completions are what the usage text makes.
func TestGenerated(t *testing.T) {
	dir := kittest.Scratch(t)
	command(t, help(t), nil, "go", "-C", packagingDir, "run", "./usage", "-out", dir)
	entries := must[[]os.DirEntry](t)(os.ReadDir(dir))
	if len(entries) != 4 {
		t.Errorf("%d files are made", len(entries))
	}
	for _, e := range entries {
		want := must[[]byte](t)(os.ReadFile(filepath.Join(dir, e.Name())))
		have := must[[]byte](t)(os.ReadFile(filepath.Join(packagingDir, "generated", e.Name())))
		if string(have) != string(want) {
			t.Errorf("%s is not what the usage text makes; run make generate", e.Name())
		}
	}
}

// TestManual: groff has no warning, and the page has each line of the usage text that
// begins with a verb or a flag.
func TestManual(t *testing.T) {
	needs(t, "groff")
	page := packagingDir + "/generated/durable-snapshotter.8"
	if out, err := exec.Command("groff", "-man", "-ww", "-z", "-Tutf8", page).CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("groff: %v: %s", err, out)
	}
	text := command(t, "", nil, "groff", "-man", "-Tascii", "-P-cbou", "-rLL=400n", page)
	have := strings.Join(strings.Fields(text), " ")
	found := 0
	for line := range strings.Lines(help(t)) {
		if m := regexp.MustCompile(`^  (\S+(?: \S+)*)`).FindStringSubmatch(line); m != nil {
			found++
			if head := strings.Join(strings.Fields(m[1]), " "); !strings.Contains(have, head) {
				t.Errorf("the manual page lacks %q", head)
			}
		}
	}
	if found < 15 {
		t.Errorf("only %d verbs and flags were found", found)
	}
}

// completions are words that a shell must complete, and to what at least. FLAG is
// accepted by the program, see TestFlagsAccepted.
var completions = []struct {
	words string // the last one is completed; empty after a space
	want  []string
}{
	{"durable-snapshotter ", []string{"serve", "check", "repair", "inspect", "health", "config", "version"}},
	{"durable-snapshotter ch", []string{"check"}},
	{"durable-snapshotter check --d", []string{"--deep"}},
	{"durable-snapshotter repair --im", []string{"--images"}},
	{"durable-snapshotter serve --log-level wa", []string{"warn"}},
	{"durable-snapshotter config de", []string{"default"}},
	{"durable-snapshotter inspect --config /etc/pass", []string{"/etc/passwd"}},
}

func TestBashCompletion(t *testing.T) {
	for _, c := range completions {
		script := `. "$1"; IFS=' ' read -ra COMP_WORDS <<<"$2"; [[ $2 == *' ' ]] && COMP_WORDS+=("")
			COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _durable_snapshotter; printf '%s\n' "${COMPREPLY[@]}"`
		got := strings.Fields(command(t, "", nil, "bash", "-c", script, "bash", packagingDir+"/generated/durable-snapshotter.bash", c.words))
		verify(t, c.words, c.want, got)
	}
}

func TestFishCompletion(t *testing.T) {
	needs(t, "fish")
	for _, c := range completions {
		out := command(t, "", []string{"HOME=" + kittest.Scratch(t)}, "fish", "-N", "-c",
			`source $argv[1]; complete -C $argv[2]`, packagingDir+"/generated/durable-snapshotter.fish", c.words)
		var got []string
		for line := range strings.Lines(out) {
			word, _, _ := strings.Cut(strings.TrimSpace(line), "\t")
			got = append(got, word)
		}
		verify(t, c.words, c.want, got)
	}
}

// TestZshCompletion runs a shell on a terminal of its own: zsh completes nowhere else.
func TestZshCompletion(t *testing.T) {
	needs(t, "zsh")
	script := `zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell "PS1=READY; fpath=($1 \$fpath); autoload -Uz compinit; compinit -u -D; zstyle ':completion:*' list-prompt ''; LISTMAX=1000; unsetopt beep; stty cols 500; print LOA''DED"
zpty -m -r shell text '*LOADED*'
zpty -n -w shell "$2"$'\t\t'
sleep ${3:-1}
while zpty -r -t shell text; do print -rn -- "$text"; done
zpty -d shell`
	dir := must[string](t)(filepath.Abs(packagingDir + "/generated"))
	for _, c := range completions {
		// What is completed at once shows up in the line, the rest in a list below it.
		var got []string
		for _, seconds := range []string{"1", "5", "30"} {
			out := command(t, "", nil, "zsh", "-f", "-c", script, "zsh", dir, c.words, seconds)
			got = regexp.MustCompile(`[\w/-]+`).FindAllString(out, -1)
			if !slices.ContainsFunc(c.want, func(w string) bool { return !slices.Contains(got, w) }) {
				break
			}
		}
		verify(t, c.words, c.want, got)
	}
}

func verify(t *testing.T, words string, want, got []string) {
	t.Helper()
	for _, w := range want {
		if !slices.Contains(got, w) {
			t.Errorf("%q: %q is not among %q", words, w, got)
		}
	}
}

// TestFlagsAccepted: the program accepts each flag that bash completes.
func TestFlagsAccepted(t *testing.T) {
	text := string(must[[]byte](t)(os.ReadFile(packagingDir + "/generated/durable-snapshotter.bash")))
	flags := 0
	for _, verb := range regexp.MustCompile(`(?m)^\t\t([a-z]+)\) words='(.*)' ;;$`).FindAllStringSubmatch(text, -1) {
		for _, flag := range strings.Fields(verb[2]) {
			if !strings.HasPrefix(flag, "--") {
				continue
			}
			flags++
			args := []string{verb[1], flag, "--help"}
			if strings.Contains(text, "\n\t"+flag+") ") {
				args = []string{verb[1], flag, "value", "--help"}
			}
			// --help comes after: a flag that is not known ends the program before.
			if out, err := exec.Command(kittest.Binaries(t).Daemon, args...).CombinedOutput(); err != nil {
				t.Errorf("%q: %v: %s", args, err, out)
			}
		}
	}
	if flags < 30 {
		t.Errorf("only %d flags were found", flags)
	}
}

// runsContainerd are the units that run a containerd.
var runsContainerd = []string{
	"containerd", "docker", "k3s", "k3s-agent", "rke2-server", "rke2-agent", "k0scontroller", "k0sworker", "snap.microk8s.daemon-containerd",
}

// TestOrder: the daemon starts before each unit that runs a containerd, and none of
// them requires it.
func TestOrder(t *testing.T) {
	unit := string(must[[]byte](t)(os.ReadFile(packagingDir + "/systemd/durable-snapshotter.service")))
	var before []string
	for _, line := range regexp.MustCompile(`(?m)^Before=(.*)$`).FindAllStringSubmatch(unit, -1) {
		before = append(before, strings.Fields(line[1])...)
	}
	script := string(must[[]byte](t)(os.ReadFile(packagingDir + "/openrc/durable-snapshotter")))
	openrc := strings.Fields(regexp.MustCompile(`(?m)^\tbefore (.*)$`).FindStringSubmatch(script)[1])
	for _, name := range runsContainerd {
		if !slices.Contains(before, name+".service") {
			t.Errorf("the unit is not ordered before %s", name)
		}
		if !strings.Contains(name, ".") && !slices.Contains(openrc, name) {
			t.Errorf("the OpenRC script is not ordered before %s", name)
		}
	}
	if strings.Contains(unit, "RequiredBy=") || !strings.Contains(unit, "\nWantedBy=multi-user.target\n") {
		t.Error("the unit is to be wanted by multi-user.target, and required by nothing")
	}
}

// TestUnits: systemd has no complaint about the units, installed below either prefix.
func TestUnits(t *testing.T) {
	needs(t, "systemd-analyze")
	for _, prefix := range []string{"/usr", "/usr/local"} {
		root := install(t, prefix)
		dir := filepath.Join(root, prefix, "lib/systemd/system")
		// systemd knows targets and the other units from where it runs; the program
		// and the manual page are looked up there, too.
		for _, name := range []string{"durable-snapshotter.service", "durable-snapshotter.socket"} {
			path := filepath.Join(dir, name)
			text := string(must[[]byte](t)(os.ReadFile(path)))
			text = strings.ReplaceAll(text, "man:durable-snapshotter(8) ", "")
			text = strings.ReplaceAll(text, "Documentation=man:durable-snapshotter(8)\n", "")
			program := prefix + "/bin/durable-snapshotter"
			if strings.HasSuffix(name, ".service") && !strings.Contains(text, "ExecStart="+program+" serve\n") {
				t.Errorf("%s does not start %s", path, program)
			}
			check(t, os.WriteFile(path, []byte(strings.ReplaceAll(text, program, filepath.Join(root, program))), 0o644))
		}
		for _, name := range []string{"durable-snapshotter.service", "durable-snapshotter.socket"} {
			out, err := exec.Command("systemd-analyze", "verify", "--recursive-errors=no", filepath.Join(dir, name)).CombinedOutput()
			if err != nil || len(out) > 0 {
				t.Errorf("systemd-analyze verify %s: %v: %s", name, err, out)
			}
		}
	}
}

// TestScripts: the shells accept the scripts.
func TestScripts(t *testing.T) {
	for pattern, shell := range map[string]string{"*.sh": "bash", "scripts/*.sh": "sh", "openrc/*": "sh", "generated/*.bash": "bash"} {
		files := must[[]string](t)(filepath.Glob(filepath.Join(packagingDir, pattern)))
		if len(files) == 0 {
			t.Errorf("no %s", pattern)
		}
		for _, file := range files {
			command(t, "", nil, shell, "-n", file)
		}
	}
}

// TestUninstall: what was installed is removed, and nothing else; the state is kept, and the
// output says so.
func TestUninstall(t *testing.T) {
	root := install(t, "/usr/local")
	program := filepath.Join(root, "usr/local/bin/durable-snapshotter")
	if out := command(t, "", nil, program, "version"); !strings.HasPrefix(out, "durable-snapshotter ") {
		t.Errorf("%s version: %q", program, out)
	}
	others := []string{"usr/local/bin/other", "var/lib/durable-snapshotter/metadata.db"}
	for _, name := range others {
		check(t, os.MkdirAll(filepath.Dir(filepath.Join(root, name)), 0o755))
		check(t, os.WriteFile(filepath.Join(root, name), nil, 0o644))
	}
	out := command(t, "", []string{"DESTDIR=" + root, "PREFIX=/usr/local"}, packagingDir+"/install.sh", "uninstall")
	if !strings.Contains(out, root+"/var/lib/durable-snapshotter is kept") {
		t.Errorf("uninstall: %q", out)
	}
	var left []string
	check(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			left = append(left, strings.TrimPrefix(path, root+"/"))
		}
		return err
	}))
	if !slices.Equal(left, others) {
		t.Errorf("uninstall leaves %q, want %q", left, others)
	}
}
