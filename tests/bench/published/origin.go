package published

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// Origin is how, where and of what a report was measured.
type Origin struct {
	Schema     int       `json:"schema"` // of the report, so that no program takes it for another one
	Time       time.Time `json:"time"`
	Command    string    `json:"command"` // with the flags that change figures
	Machine    Machine   `json:"machine"`
	Revision   string    `json:"revision"`   // of the product
	Dirty      bool      `json:"dirty"`      // the product was built from a tree with changes
	Containerd string    `json:"containerd"` // its version
	Go         string    `json:"go"`
}

// Machine is where it ran.
type Machine struct {
	CPU    string `json:"cpu"`
	Cores  int    `json:"cores"`
	Memory int64  `json:"memory"` // bytes
	Kernel string `json:"kernel"`
}

// Describe is the origin of what is measured now, with these programs.
func Describe(ctx context.Context, bins kit.Binaries, schema int, command string) (Origin, error) {
	o := Origin{Schema: schema, Time: time.Now().UTC().Truncate(time.Second), Command: command, Go: runtime.Version()}
	return o, errors.Join(o.describeMachine(), o.describeProduct(ctx, bins))
}

// String is the origin in words, behind what the report itself has to add.
func (o Origin) String() string {
	dirty := ""
	if o.Dirty {
		dirty = " with changes"
	}
	return fmt.Sprintf("%s, %d cores, %d GiB, Linux %s; containerd %s; revision %.12s%s; %s: `%s`",
		o.Machine.CPU, o.Machine.Cores, o.Machine.Memory>>30, o.Machine.Kernel, o.Containerd, o.Revision, dirty, o.Time.Format("2006-01-02"), o.Command)
}

// Save writes a report.
func Save(file string, report any) error {
	text, err := json.MarshalIndent(report, "", "\t")
	if err != nil {
		return fmt.Errorf("report %s: %w", file, err)
	}
	return os.WriteFile(file, append(text, '\n'), 0o644)
}

// Load reads a report of a schema.
func Load(file string, schema int, report any) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var o Origin
	if err := errors.Join(json.Unmarshal(text, &o), json.Unmarshal(text, report)); err != nil {
		return fmt.Errorf("report %s: %w", file, err)
	}
	if o.Schema != schema {
		return fmt.Errorf("report %s: schema %d, this program reads %d", file, o.Schema, schema)
	}
	return nil
}

// Git asks about the repository, which may belong to another user than root.
func Git(ctx context.Context, args ...string) (string, error) {
	tests, err := kit.Module()
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, "git", append([]string{"-c", "safe.directory=*", "-C", filepath.Dir(tests)}, args...)...)
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w", strings.Join(cmd.Args, " "), err)
	}
	return strings.TrimSpace(string(out)), nil
}

// describeProduct takes the version of containerd from its own words, which end with a revision.
func (o *Origin) describeProduct(ctx context.Context, bins kit.Binaries) (err error) {
	if o.Revision, err = Git(ctx, "rev-parse", "HEAD"); err != nil {
		return err
	}
	changes, err := Git(ctx, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!tests", ":!docs", ":!*.md", ":!Makefile")
	if err != nil {
		return err
	}
	o.Dirty = changes != ""
	out, err := exec.CommandContext(ctx, bins.Containerd, "--version").Output()
	words := strings.Fields(string(out))
	if err != nil || len(words) < 3 {
		return fmt.Errorf("version of containerd: %q: %w", out, err)
	}
	o.Containerd, _, _ = strings.Cut(strings.TrimPrefix(words[2], "v"), "+")
	return nil
}

func (o *Origin) describeMachine() error {
	var u unix.Utsname
	var info unix.Sysinfo_t
	if err := errors.Join(unix.Uname(&u), unix.Sysinfo(&info)); err != nil {
		return err
	}
	o.Machine = Machine{CPU: runtime.GOARCH, Cores: runtime.NumCPU(), Memory: int64(info.Totalram) * int64(info.Unit), Kernel: unix.ByteSliceToString(u.Release[:])}
	text, err := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			o.Machine.CPU = strings.TrimSpace(value)
			break
		}
	}
	return err
}
