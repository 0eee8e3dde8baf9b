package layout

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
		err := CheckName("key", name)
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
		{"default/4/anything", map[string]string{LabelTarget: chain}, chain, true},
		{"docker/9/extract-12-Ab-_=-" + chain, nil, chain, true}, // moby
		{"buildkit/3/extract-u2jk3 " + chain, nil, chain, true},
		{"buildkit/3/key", map[string]string{LabelTarget: "buildkit-layer-snapshot-v1-sha256-" + chain[7:]}, chain, true},
		{"moby/4/key", map[string]string{LabelTarget: "no digest"}, "", true},
		{"k8s.io/4/" + chain + "-remap", nil, "", false},
		{"default/4/container", nil, "", false},
		{"default/4/extract-my-files", nil, "", false},
		{"default/4/extractor " + chain, nil, "", false},
	} {
		id, ok := ExtractionOf(c.key, c.labels)
		if id != c.chainID || ok != c.extraction {
			t.Errorf("%q %v: %q, %v", c.key, c.labels, id, ok)
		}
	}
}

func TestChainIDOf(t *testing.T) {
	for _, c := range []struct {
		name, ref, want string
	}{
		{"buildkit/7/buildkit-layer-snapshot-v1-sha256-" + chain[7:], "", chain},
		{"buildkit-layer-snapshot-v1-sha256-" + chain[7:], "", chain},
		{"buildkit/7/buildkit-layer-snapshot-v1-sha256-short", "", ""},
		{"buildkit/7/buildkit-layer-snapshot-v1-" + chain[7:], "", ""},
		{"buildkit/7/u2jk3l4m5", "", ""},                       // a build step
		{"moby/7/0f1e2d-init", "", ""},                         // container's own
		{"k8s.io/7/" + chain + "-remap", "", ""},               // while owners are shifted
		{"k8s.io/7/" + chain, chain, chain},                    // containerd's unpacker
		{"k8s.io/7/somebody's", chain, ""},                     // a label alone proves nothing
		{"k8s.io/7/" + chain, "sha256:" + chain[8:] + "0", ""}, // another layer's
		{"buildkit/7/buildkit-layer-snapshot-v1-sha256-" + chain[7:], "buildkit-layer-snapshot-v1-sha256-" + chain[7:], chain},
	} {
		if got := ChainIDOf(c.name, map[string]string{LabelTarget: c.ref}); got != c.want {
			t.Errorf("%q with the label %q: %q, want %q", c.name, c.ref, got, c.want)
		}
	}
	for name, want := range map[string]string{"k8s.io/3/" + chain: chain, chain: chain, "default/1/my-image": "", "a/b": ""} {
		if got := ChainIDOf(name, nil); got != want {
			t.Errorf("%q: %q", name, got)
		}
	}
	if ns, rest := SplitName("k8s.io/3/a/b"); ns != "k8s.io" || rest != "a/b" {
		t.Errorf("split into %q and %q", ns, rest)
	}
}
