package snapshotter

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

const chain = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func TestCheckName(t *testing.T) {
	for name, ok := range map[string]bool{
		"a": true, "k8s.io/12/" + chain: true, "default/1/extract-1-ab cd " + chain: true, "a..b/...": true,
		strings.Repeat("x", maxName): true,
		"":                           false, "..": false, "a/../b": false, "../a": false, "a/..": false, "a\x00b": false,
		strings.Repeat("x", maxName+1): false, strings.Repeat("x", 1<<20): false,
	} {
		err := checkName("key", name)
		if ok && err != nil || !ok && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%.40q: %v", name, err)
		}
		if err != nil && len(err.Error()) > 2*maxName {
			t.Errorf("%.40q: the error has %d bytes", name, len(err.Error()))
		}
	}
}

func TestExtractionOf(t *testing.T) {
	for _, c := range []struct {
		key        string
		labels     map[string]string
		chainID    string
		extraction bool
	}{
		{"k8s.io/3/extract-123-AbC- " + chain, nil, chain, true},
		{"extract-123-AbC- " + chain, nil, chain, true},
		{"default/4/anything", map[string]string{labelTarget: chain}, chain, true},
		{"default/4/container", nil, "", false},
		{"default/4/extract-my-files", nil, "", false},
		{"default/4/extractor " + chain, nil, "", false},
	} {
		id, ok := extractionOf(c.key, c.labels)
		if id != c.chainID || ok != c.extraction {
			t.Errorf("%q %v: %q, %v", c.key, c.labels, id, ok)
		}
	}
}

func TestChainIDOf(t *testing.T) {
	for name, want := range map[string]string{"k8s.io/3/" + chain: chain, chain: chain, "default/1/my-image": "", "a/b": ""} {
		if got := chainIDOf(name, nil); got != want {
			t.Errorf("%q: %q", name, got)
		}
	}
	if ns, rest := splitName("k8s.io/3/a/b"); ns != "k8s.io" || rest != "a/b" {
		t.Errorf("split into %q and %q", ns, rest)
	}
}
