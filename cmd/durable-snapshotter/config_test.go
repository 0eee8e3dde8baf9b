package main

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
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

// FuzzConfig: a file is refused with words, or is a configuration that is the same when it is
// printed and read again.
func FuzzConfig(f *testing.F) {
	example, err := os.ReadFile("../../config.toml.example")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(example)
	f.Add([]byte("root = '/r'\n[scrub]\ninterval = '-1h'\nrate = -9223372036854775808\n[heal]\narchives = ['/a', 'b']\n"))
	f.Add([]byte("[admin]\nmetrics_address = '[::1]:x'\n[containerd]\naddress = ''\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		cfg := Default()
		if err := decode("file", text, &cfg); err != nil {
			if !strings.HasPrefix(err.Error(), "file:") {
				t.Errorf("the error does not name the file: %v", err)
			}
			return
		}
		if err := cfg.Validate(); err != nil {
			return
		}
		cfg.snapshotter()
		cfg.notifier()
		cfg.imageCheck()
		printed, err := toml.Marshal(cfg)
		if err != nil {
			t.Fatal(err)
		}
		var again Config
		if err := decode("printed", printed, &again); err != nil || !reflect.DeepEqual(cfg, again) {
			t.Errorf("%+v\nbecame %+v, %v", cfg, again, err)
		}
	})
}
