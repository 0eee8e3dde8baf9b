package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

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
		{"serv", 2, `unknown command "serv"`},
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
		{"repair --orphans --deep", 2, "--orphans"},
		{"repair --orphans sha256:00", 2, "--orphans"},
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
