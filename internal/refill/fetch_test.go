package refill

import (
	"errors"
	"slices"
	"strings"
	"testing"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"

	"github.com/durable-snapshotter/durable-snapshotter/internal/library"
)

// TestReferences: a manifest is fetched by its digest, from where names of images and labels of
// its blobs have it; what names no registry is left out.
func TestReferences(t *testing.T) {
	manifest, config, index := digest.FromString("manifest"), digest.FromString("config"), digest.FromString("index")
	l := &library.Library{Blobs: map[digest.Digest]content.Info{
		index:    {Digest: index, Labels: map[string]string{"containerd.io/gc.ref.content.m.0": manifest.String()}},
		manifest: {Digest: manifest, Labels: map[string]string{sourceLabel + "docker.io": "library/app,library/other"}},
		config:   {Digest: config, Labels: map[string]string{sourceLabel + "mirror.example": "app"}},
	}}
	var all []*imagesapi.Image
	for name, d := range map[string]digest.Digest{
		"docker.io/library/app:1":             index,
		"docker.io/library/app@" + "sha256:0": index,
		"localhost:5000/deep/app:v1":          manifest,
		"sha256:" + config.Encoded():          index,
		"app:latest":                          manifest,
		"local/app:latest":                    manifest,
		fetchedPrefix + manifest.String():     manifest,
		"quay.io/another:1":                   digest.FromString("another"),
	} {
		all = append(all, &imagesapi.Image{Name: name, Target: &types.Descriptor{Digest: d.String()}})
	}
	m := library.Manifest{Digest: manifest, Config: config}
	got := references(namesOf(l, m, all), l, manifest, m.Parts())
	slices.Sort(got)
	var want []string
	for _, repository := range []string{"docker.io/library/app", "docker.io/library/other", "localhost:5000/deep/app", "mirror.example/app"} {
		want = append(want, repository+"@"+manifest.String())
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// TestFetchErrorNamesTheCure: where a registry wants credentials, the kubelet has them.
func TestFetchErrorNamesTheCure(t *testing.T) {
	for text, wants := range map[string]bool{
		"failed to resolve image: unexpected status from HEAD request to http://x/v2/: 401 Unauthorized":                                       true,
		"pull access denied, repository does not exist or may require authorization: server message: insufficient_scope: authorization failed": true,
		"dial tcp 127.0.0.1:1: connect: connection refused":                                                                                    false,
	} {
		err := errors.New(text)
		e := &FetchError{Refs: []string{"ref"}, Err: err, Credentials: wantsCredentials(err)}
		if e.Credentials != wants || strings.Contains(e.Error(), "kubelet") != wants || !errors.Is(e, err) {
			t.Errorf("%q: %v", text, e)
		}
	}
}
