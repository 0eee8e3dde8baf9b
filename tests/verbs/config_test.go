package verbs

import (
	"bufio"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestConfigDefault compares what the program calls its defaults with the file
// that users copy.
func TestConfigDefault(t *testing.T) {
	module, err := kit.Module()
	if err != nil {
		t.Fatal(err)
	}
	example, err := os.ReadFile(filepath.Join(module, "..", "config.toml.example"))
	if err != nil {
		t.Fatal(err)
	}
	if got := durable(t, "config", "default"); got != string(example) {
		t.Errorf("config.toml.example is not the output of config default:\n%s", got)
	}
}

// TestConfigEffective changes every key, in the file and by flags, and reads it
// back from what `config` prints.
func TestConfigEffective(t *testing.T) {
	defaults := keys(durable(t, "config", "default"))
	file := filepath.Join(scratch(t), "config.toml")
	writeFile(t, file, `
root = '/from/file'
content_root = '/from/content'
address = '/from/file.sock'
log_level = 'warn'
[snapshotter]
upperdir_label = true
sync_remove = true
slow_chown = true
mount_options = ['volatile']
[diff]
enabled = false
decompressor = 'internal'
sync = 'files'
[journal]
history = 7
[scrub]
interval = '1h'
depth = 'content'
rate = 5
[heal]
archives = ['/srv/images']
registry = false
hosts = '/etc/hosts.d'
[images]
repair = 'full'
[admin]
metrics_address = '127.0.0.1:9273'
pprof = true
[containerd]
address = '/from/containerd.sock'
snapshotter = 'other'
drop_images = false
`)
	fromFile := keys(durable(t, "config", "--config", file))
	for key, value := range defaults {
		if fromFile[key] == value {
			t.Errorf("%s = %s from the default, although the file sets it, or the test does not know the key", key, value)
		}
	}
	if got := fromFile["[snapshotter] mount_options"]; !strings.Contains(got, "volatile") {
		t.Errorf("mount_options = %s", got)
	}
	flags := keys(durable(t, "config", "--config", file, "--root", "/from/flag", "--address", "/flag.sock", "--log-level", "trace"))
	want := map[string]string{"root": "'/from/flag'", "address": "'/flag.sock'", "log_level": "'trace'"}
	for key, value := range fromFile {
		if _, overridden := want[key]; !overridden {
			want[key] = value
		}
	}
	for key, value := range want {
		if flags[key] != value {
			t.Errorf("with flags, %s = %s, want %s", key, flags[key], value)
		}
	}
	// What it prints is itself a configuration that means the same.
	printed := filepath.Join(scratch(t), "printed.toml")
	writeFile(t, printed, durable(t, "config", "--config", file))
	if again := durable(t, "config", "--config", printed); again != durable(t, "config", "--config", file) {
		t.Errorf("printed, read and printed again it is different:\n%s", again)
	}
}

// keys reads the simple TOML that config prints: one key a line.
func keys(text string) map[string]string {
	m := map[string]string{}
	table := ""
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			table = line + " "
			continue
		}
		if key, value, ok := strings.Cut(line, " = "); ok && !strings.HasPrefix(line, "#") {
			m[table+key] = value
		}
	}
	return m
}

// durable runs a verb of the program and returns its output.
func durable(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command(kittest.Binaries(t).Daemon, args...).Output()
	if err != nil {
		t.Fatalf("durable-snapshotter %q: %v", args, err)
	}
	return string(out)
}

// TestWarnings starts the daemon on disks whose promises are weaker than ours,
// and on good ones.
func TestWarnings(t *testing.T) {
	for _, c := range []struct {
		name string
		disk kit.DiskOptions
		warn string // empty: no warning at all
	}{
		{"ext4", kit.DiskOptions{FS: "ext4"}, ""},
		{"xfs", kit.DiskOptions{FS: "xfs"}, ""},
		{"btrfs", kit.DiskOptions{FS: "btrfs"}, ""},
		{"ext4 without a journal", kit.DiskOptions{FS: "ext4", Mkfs: []string{"-O", "^has_journal"}}, "no journal"},
		{"ext4 with data=writeback", kit.DiskOptions{FS: "ext4", Mount: "data=writeback"}, "data=writeback"},
		{"ext4 with nobarrier", kit.DiskOptions{FS: "ext4", Mount: "nobarrier"}, "nobarrier"},
		{"ext4 with data=journal", kit.DiskOptions{FS: "ext4", Mount: "data=journal"}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.disk.Size = 512 << 20
			disk := newDisk(t, c.disk)
			d := kittest.StartDaemon(t, kit.DaemonOptions{Dir: disk.Path("d"), RunDir: scratch(t)})
			kittest.MakeLayer(t, d, "layer")
			if err := d.Stop(); err != nil {
				t.Fatal(err)
			}
			log, err := d.Log()
			if err != nil {
				t.Fatal(err)
			}
			warnings := warningsIn(t, log)
			switch {
			case c.warn == "" && len(warnings) != 0:
				t.Errorf("warns of %q", warnings)
			case c.warn != "" && len(warnings) != 1:
				t.Errorf("%d warnings, want one: %q", len(warnings), warnings)
			case c.warn != "" && (!strings.Contains(warnings[0].Msg, c.warn) || warnings[0].Cure == ""):
				t.Errorf("warning %+v, want one of %q with a cure", warnings[0], c.warn)
			}
		})
	}
}

type warning struct{ Level, Msg, Cure string }

// warningsIn reads a log in JSON, which is what the daemon writes when its
// standard error is not a terminal, and returns all above the level of info.
func warningsIn(t *testing.T, log string) (found []warning) {
	t.Helper()
	for lines := bufio.NewScanner(strings.NewReader(log)); lines.Scan(); {
		var w warning
		if err := json.Unmarshal(lines.Bytes(), &w); err != nil {
			t.Fatalf("not a line of JSON: %q", lines.Text())
		}
		if w.Level != "debug" && w.Level != "info" {
			found = append(found, w)
		}
	}
	return found
}
