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
