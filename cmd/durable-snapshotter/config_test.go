package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestExampleIsTheDefault keeps config.toml.example honest; make it again with
// durable-snapshotter config default.
func TestExampleIsTheDefault(t *testing.T) {
	var out, errs bytes.Buffer
	if status := run(t.Context(), []string{"config", "default"}, &out, &errs); status != 0 {
		t.Fatal(errs.String())
	}
	example, err := os.ReadFile("../../config.toml.example")
	if err != nil {
		t.Fatal(err)
	}
	if out.String() != string(example) {
		t.Errorf("config default prints\n%s\nconfig.toml.example is\n%s", out.String(), example)
	}
	cfg := Config{}
	if err := decode("example", example, &cfg); err != nil {
		t.Error(err)
	}
}

func TestConfigPrecedence(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(file, []byte("root = '/from/file'\nlog_level = 'warn'\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	args := []string{"config", "--config", file, "--root", "/from/flag", "--address", "unix:///run/x/y.sock"}
	if status := run(t.Context(), args, &out, &errs); status != 0 {
		t.Fatal(errs.String())
	}
	for _, want := range []string{"root = '/from/flag'", "log_level = 'warn'", "address = '/run/x/y.sock'", "history = 1000"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %s in\n%s", want, out.String())
		}
	}
}

// TestCommandLine: rows are mistakes; each ends with its exit status and words
// that name the thing.
func TestCommandLine(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	unknown := file("unknown.toml", "root = '/r'\n\n[snapshotter]\nasync_remove = true\n")
	broken := file("broken.toml", "root = '/r'\nlog_level = \n")
	kind := file("kind.toml", "root = 3\n")
	for _, c := range []struct {
		args   string
		status int
		want   string
	}{
		{"", 2, "Usage:"},
		{"serv", 2, `"serv" is not a verb`},
		{"serve --frobnicate", 2, "frobnicate"},
		{"serve now", 2, `"now"`},
		{"config --config " + unknown, 1, unknown + `:4: unknown key "snapshotter.async_remove"`},
		{"config --config " + broken, 1, broken + ":2:"},
		{"config --config " + kind, 1, kind + ":1:"},
		{"config --config " + dir + "/none.toml", 1, "none.toml: no such file"},
		{"config --root relative", 1, `root "relative": not an absolute path`},
		{"config --address relative.sock", 1, `address "relative.sock": not an absolute path`},
		{"config --address /" + strings.Repeat("x", 200), 1, "the kernel allows 107"},
		{"config --log-level loud", 1, `log_level "loud"`},
		{"config defaults", 2, `"defaults"`},
		{"repair --root " + dir + "/none", 1, dir + "/none"},
		{"repair --rebuild --apply", 2, "--apply"},
		{"check --root " + dir + "/none", 2, dir + "/none"},
		{"check --deep --cached", 2, "--cached"},
		{"version x", 2, `"x"`},
	} {
		var out, errs bytes.Buffer
		status := run(t.Context(), strings.Fields(c.args), &out, &errs)
		if status != c.status || !strings.Contains(errs.String(), c.want) {
			t.Errorf("%q: status %d, %q; want %d, %q", c.args, status, errs.String(), c.status, c.want)
		}
	}
	for _, args := range []string{"help", "--help", "version", "--version", "serve --help"} {
		var out, errs bytes.Buffer
		if status := run(t.Context(), strings.Fields(args), &out, &errs); status != 0 || out.Len() == 0 {
			t.Errorf("%q: status %d, %q", args, status, errs.String())
		}
	}
}
