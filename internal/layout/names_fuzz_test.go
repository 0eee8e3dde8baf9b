package layout

import (
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// FuzzNames: what is read out of names and labels of clients, and of the names of
// directories, has the form that the rest of the program relies on.
func FuzzNames(f *testing.F) {
	f.Add("k8s.io/3/"+chain, chain)
	f.Add("k8s.io/12/extract-123456789-abcd "+chain, "buildkit-layer-snapshot-v1-"+strings.Replace(chain, ":", "-", 1))
	f.Add("a/1/extract-1-"+chain, "")
	f.Add("12.6f2c.0011", "sha256:../../x")
	f.Add("a/../b\x00", "..")
	f.Fuzz(func(t *testing.T, name, ref string) {
		labels := map[string]string{LabelTarget: ref}
		chainID, extraction := ExtractionOf(name, labels)
		for _, id := range []string{chainID, ChainIDOf(name, labels), ChainIDOf(name, nil)} {
			if id != "" && !IsDigest(id) {
				t.Errorf("chain ID %q", id)
			}
		}
		if chainID != "" && !extraction {
			t.Error("a chain ID, and no extraction")
		}
		if id := ChainIDOf(name, labels); id != "" && id != ChainIDOf(name, nil) {
			t.Errorf("a label alone has made the chain ID %q", id)
		}
		if namespace, rest := SplitName(name); !strings.HasPrefix(name, namespace) || !strings.HasSuffix(name, rest) {
			t.Errorf("split into %q and %q", namespace, rest)
		}
		if CheckName("key", name) == nil && (name == "" || len(name) > maxName || strings.ContainsRune(name, 0) || slices.Contains(strings.Split(name, "/"), "..")) {
			t.Error("accepted as a name")
		}
		_ = CheckLabels(map[string]string{name: ref})
		if id, ok := DirectoryID(name); ok && strconv.FormatUint(id, 10) != name {
			t.Errorf("directory number %d", id)
		}
		if id, err := LayerOf(name); err == nil && !strings.Contains(filepath.Base(name), strconv.FormatUint(id, 10)) {
			t.Errorf("number of a layer %d", id)
		}
		for _, replaced := range []bool{false, true} {
			if boot := BootOf(name, replaced); !strings.Contains(name, boot) {
				t.Errorf("boot %q", boot)
			}
		}
	})
}
