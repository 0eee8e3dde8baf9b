package configs

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// documented returns the fenced configuration texts of README.md and
// docs/containerd.md by their first lines, which are comments that name where the
// text goes.
func documented(t *testing.T) map[string]string {
	t.Helper()
	module := must[string](t)(kit.Module())
	texts := map[string]string{}
	for _, name := range []string{"README.md", "docs/containerd.md"} {
		b := must[[]byte](t)(os.ReadFile(filepath.Join(module, "..", name)))
		var text strings.Builder
		inside := false
		for line := range strings.Lines(string(b)) {
			switch {
			case !inside && (line == "```toml\n" || line == "```yaml\n" || line == "```jsonc\n"):
				inside = true
				text.Reset()
			case inside && line == "```\n":
				inside = false
				first, _, _ := strings.Cut(text.String(), "\n")
				key := strings.TrimPrefix(strings.TrimPrefix(first, "# "), "// ")
				if key == first {
					t.Errorf("%s: the text that begins with %q does not name its place in a comment", name, first)
				}
				if old, ok := texts[key]; ok && old != text.String() {
					t.Errorf("%s: another text %q differs", name, key)
				}
				texts[key] = text.String()
			case inside:
				text.WriteString(line)
			}
		}
	}
	return texts
}

// table returns the name in the header of a TOML table, with one kind of quotes.
func table(line string) (name string, ok bool) {
	line, _, _ = strings.Cut(strings.TrimSpace(line), " #")
	if !strings.HasPrefix(line, "[") || strings.HasPrefix(line, "[[") || !strings.HasSuffix(line, "]") {
		return "", false
	}
	return strings.ReplaceAll(strings.Trim(line, "[]"), "'", `"`), true
}

// set replaces the value of a key that a table of a TOML text has. An empty name
// is the top of the file.
func set(t *testing.T, text, name, key, value string) string {
	t.Helper()
	current := ""
	var out strings.Builder
	found := false
	for line := range strings.Lines(text) {
		if header, ok := table(line); ok {
			current = header
		} else if k, _, ok := strings.Cut(line, "="); ok && current == name && strings.TrimSpace(k) == key {
			line = line[:len(line)-len(strings.TrimLeft(line, " "))] + key + " = " + value + "\n"
			found = true
		}
		out.WriteString(line)
	}
	if !found {
		t.Fatalf("the table [%s] has no key %s:\n%s", name, key, text)
	}
	return out.String()
}
