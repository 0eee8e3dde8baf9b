package library

import (
	"bytes"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
)

// labelStore has the labels of containerd's content store, which its database has else.
type labelStore map[digest.Digest]map[string]string

func (s labelStore) Get(d digest.Digest) (map[string]string, error) { return maps.Clone(s[d]), nil }

func (s labelStore) Set(d digest.Digest, all map[string]string) error { s[d] = all; return nil }

func (s labelStore) Update(d digest.Digest, all map[string]string) (map[string]string, error) {
	return all, s.Set(d, all)
}

// FuzzRead: whatever labels and blobs a client has stored in containerd, reading them ends,
// and every digest of an image is one. The words MANIFEST, CONFIG and LAYER stand for the
// digests of the blobs; a label is a line, of MANIFEST up to an empty line, then of CONFIG.
func FuzzRead(f *testing.F) {
	pulled := refConfig + "=CONFIG\n" + refLayer + "0=LAYER\n\n" + refSnapshot + "durable=x\n" + labels.LabelUncompressed + "=LAYER"
	config := `{"rootfs":{"diff_ids":["LAYER"]}}`
	f.Add(pulled, `{}`, config)
	f.Add(refContent+"0=CONFIG\n"+refContent+"1=LAYER", `{"config":{"digest":"CONFIG"},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"LAYER"}]}`, config)
	f.Add(refContent+"0=CONFIG", `{"config":{"digest":"CONFIG"},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"none"}]}`, `{"rootfs":{"diff_ids":["none"]}}`)
	f.Add(refContent+"m.0=MANIFEST\n"+labels.LabelDistributionSource+".docker.io=a\n\n"+refSnapshot+"durable=", `{"manifests":[]}`, `x`)
	f.Fuzz(func(t *testing.T, all, manifest, config string) {
		dir, known := t.TempDir(), labelStore{}
		words := map[string]string{"LAYER": digest.FromString("layer").String()}
		own := strings.SplitN(all, "\n\n", 2)
		put := func(word, text, lines string) {
			for from, to := range words {
				text, lines = strings.ReplaceAll(text, from, to), strings.ReplaceAll(lines, from, to)
			}
			d := digest.FromString(text)
			words[word], known[d] = d.String(), map[string]string{}
			for _, line := range strings.Split(lines, "\n") {
				if key, value, ok := strings.Cut(line, "="); ok {
					known[d][key] = value
				}
			}
			check(t, os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o755))
			check(t, os.WriteFile(filepath.Join(dir, "blobs", "sha256", d.Encoded()), []byte(text), 0o644))
		}
		put("CONFIG", config, own[len(own)-1])
		put("MANIFEST", manifest, own[0])
		cs, err := local.NewLabeledStore(dir, known)
		check(t, err)
		s := NewStore(cs)
		l, err := s.Read(namespaces.WithNamespace(t.Context(), "default"), "durable")
		check(t, err)
		to := map[digest.Digest]bool{digest.FromString("layer"): true}
		for d, info := range l.Blobs {
			l.LeadsTo(d, to)
			for _, child := range l.Children(d) {
				_, err := s.Sized(t.Context(), content.Info{Digest: child}, dir)
				check(t, err)
			}
			l.Sources(d)
			l.Unpackers(d)
			if body, flaw, err := s.Document(t.Context(), info, dir); err != nil || flaw == "" && !bytes.Equal(body, read(t, dir, d)) {
				t.Errorf("%s: %q, %v", d, flaw, err)
			}
		}
		for _, m := range l.Manifests {
			if len(m.Chain()) != len(m.DiffIDs) {
				t.Errorf("%d snapshots of %d layers", len(m.Chain()), len(m.DiffIDs))
			}
			for _, d := range append(m.Parts(), m.DiffIDs...) {
				if err := d.Validate(); err != nil {
					t.Errorf("%q: %v", d, err)
				}
			}
			for _, name := range m.Chain() {
				if len(m.Below(name))+len(m.Above(name)) != len(m.Chain()) && len(m.Chain()) < 3 {
					t.Errorf("%q is not between its layers", name)
				}
				m.Layer(name)
			}
		}
	})
}

func read(t *testing.T, dir string, d digest.Digest) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "blobs", "sha256", d.Encoded()))
	check(t, err)
	return b
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
