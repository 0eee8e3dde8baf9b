package images

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
)

// layers makes the layers of an image out of states; "+" after one: a good blob is known.
func layersOf(states ...string) (all []Layer) {
	for i, s := range states {
		state, good := strings.CutSuffix(s, "+")
		l := Layer{ChainID: digest.FromString(fmt.Sprint(i)).String(), State: State(state), Flaw: "missing"}
		if good {
			l.Source, l.Flaw = "sha256:good", ""
		}
		all = append(all, l)
	}
	return all
}

// TestJudge has the order of the verdicts: what is known to be bad, then what is not known,
// then what is missing.
func TestJudge(t *testing.T) {
	blob := []repull.Blob{{Digest: digest.FromString("blob"), Size: 7, Flaw: "corrupt"}}
	held := []Holder{{Text: "container a"}}
	none := errors.New("containerd is down")
	for _, c := range []struct {
		name   string
		f      facts
		want   Verdict
		reason string
	}{
		{"whole", facts{layers: layersOf("ready", "ready")}, Ready, ""},
		{"an artifact without layers", facts{}, Ready, ""},
		{"a blob was discarded", facts{layers: layersOf("ready"), blobs: blob}, Incomplete, "1 of 1"},
		{"damaged, good blob", facts{layers: layersOf("ready", "damaged+")}, Healable, "layer 2 of 2"},
		{"damaged and held, good blob", facts{layers: layersOf("damaged+"), holders: held}, Healable, ""},
		{"damaged, no blob", facts{layers: layersOf("damaged"), blobs: blob}, NeedsFetch, "its blob is missing"},
		{"damaged and held, no blob", facts{layers: layersOf("damaged"), holders: held}, InUse, "held by container a"},
		{"one can be healed, the other not", facts{layers: layersOf("damaged+", "damaged")}, NeedsFetch, "layer 2 of 2"},
		{"damaged, good blob, bad manifest", facts{layers: layersOf("damaged+"), documents: blob}, NeedsFetch, ""},
		{"lost, good blobs", facts{layers: layersOf("ready", "lost+")}, Healable, "containerd only"},
		{"lost and held", facts{layers: layersOf("lost+"), holders: held}, InUse, ""},
		{"lost, no blob", facts{layers: layersOf("lost")}, NeedsFetch, ""},
		{"damage is known although containerd is down", facts{layers: layersOf("damaged+"), unclear: none}, Healable, ""},
		{"containerd is down", facts{layers: layersOf("unverified"), unclear: none}, Unknown, "is down"},
		{"nothing is known of a blob", facts{layers: layersOf("ready"), unclear: none}, Unknown, "is down"},
		{"a layer could not be verified", facts{layers: layersOf("ready", "unverified")}, Unknown, "layer 2 of 2"},
		{"bad config", facts{layers: layersOf("ready"), documents: blob}, NeedsFetch, "corrupt"},
		{"imported", facts{layers: layersOf("not unpacked+", "not unpacked+")}, NotUnpacked, "0 of 2"},
		{"its base is unpacked for another image", facts{layers: layersOf("ready", "not unpacked+")}, NotUnpacked, "1 of 2"},
		{"imported, and a blob is missing", facts{layers: layersOf("not unpacked"), blobs: blob}, NeedsFetch, "cannot be unpacked"},
		{"another snapshotter has it", facts{layers: layersOf("not unpacked+"), others: []string{"overlayfs"}}, NotOurs, "overlayfs"},
		{"another snapshotter has it, without blobs", facts{layers: layersOf("not unpacked"), blobs: blob, others: []string{"overlayfs"}}, NotOurs, "cannot be unpacked"},
		{"a pull is at work", facts{layers: layersOf("not unpacked"), blobs: blob, work: "fetching"}, Pulling, "fetching"},
		{"a pull is at work, and the databases differ", facts{layers: layersOf("lost"), work: "unpacking"}, Pulling, ""},
		{"a pull is at work beside damage", facts{layers: layersOf("damaged+"), work: "unpacking"}, Healable, ""},
		{"another image with the layer is being pulled", facts{layers: layersOf("ready"), work: "unpacking"}, Ready, ""},
	} {
		got, reason := judge(c.f)
		if got != c.want || !strings.Contains(reason, c.reason) {
			t.Errorf("%s: %s (%s), want %s (%s)", c.name, got, reason, c.want, c.reason)
		}
		if got != Ready && reason == "" {
			t.Errorf("%s: %s without a reason", c.name, got)
		}
	}
}

// TestLacks: containerd's own "not found" means that a layer was never unpacked, or is to be
// unpacked; the snapshotter's, passed on, that no pull gets past the key.
func TestLacks(t *testing.T) {
	id := digest.FromString("x").String()
	own := fmt.Errorf("snapshot %v does not exist: %w", id, errdefs.ErrNotFound)
	passed := fmt.Errorf("snapshot does not exist: %w", errdefs.ErrNotFound)
	other := fmt.Errorf("snapshot k8s.io/7/%s does not exist: %w", id, errdefs.ErrNotFound)
	if !lacks(own, id) || lacks(passed, id) || lacks(other, id) || lacks(nil, id) || lacks(errors.New("snapshot "+id+" does not exist"), id) {
		t.Error(lacks(own, id), lacks(passed, id), lacks(other, id), lacks(nil, id))
	}
}

// TestWorking: an extraction of a dead client, or of an earlier run of the daemon, is no pull
// at work, and neither is a download that stands still.
func TestWorking(t *testing.T) {
	layers := layersOf("not unpacked")
	blob := repull.Blob{Digest: digest.FromString("blob"), Flaw: "missing"}
	key := "k8s.io/3/extract-1-abcd " + layers[0].ChainID
	now := time.Now()
	for _, c := range []struct {
		name  string
		rows  []Row
		loads []content.Status
		works bool
	}{
		{"nothing", nil, nil, false},
		{"an extraction", []Row{{ID: 1, Name: key, Created: now}}, nil, true},
		{"an old one", []Row{{ID: 1, Name: key, Created: now.Add(-time.Hour)}}, nil, false},
		{"one that a restart has closed", []Row{{ID: 1, Name: key, Created: now, Abandoned: true}}, nil, false},
		{"one of another layer", []Row{{ID: 1, Name: "k8s.io/3/extract-1-abcd sha256:other", Created: now}}, nil, false},
		{"one in another namespace", []Row{{ID: 1, Name: strings.Replace(key, "k8s.io", "moby", 1), Created: now}}, nil, false},
		{"a container", []Row{{ID: 1, Name: "k8s.io/3/container", Created: now}}, nil, false},
		{"a download", nil, []content.Status{{Ref: "layer-" + blob.Digest.String(), UpdatedAt: now}}, true},
		{"one that stands still", nil, []content.Status{{Ref: "layer-" + blob.Digest.String(), UpdatedAt: now.Add(-time.Hour)}}, false},
		{"one that containerd has removed", []Row{{ID: 1, Name: strings.Replace(key, "abcd", "gone", 1), Created: now}}, nil, false},
		{"one of another blob", nil, []content.Status{{Ref: "layer-sha256:other", UpdatedAt: now}}, false},
	} {
		s := &space{name: "k8s.io", downloads: c.loads}
		s.take(c.rows)
		removed := func(key string) bool { return strings.Contains(key, "gone") }
		if got := s.working(facts{layers: layers, blobs: []repull.Blob{blob}}, removed); (got != "") != c.works {
			t.Errorf("%s: %q", c.name, got)
		}
	}
}

// TestSortNames: people know an image by its tag.
func TestSortNames(t *testing.T) {
	names := []string{"sha256:0123", "docker.io/library/a@sha256:0123", "docker.io/library/b:1", "docker.io/library/a:1"}
	sortNames(names)
	want := []string{"docker.io/library/a:1", "docker.io/library/b:1", "docker.io/library/a@sha256:0123", "sha256:0123"}
	if !slices.Equal(names, want) {
		t.Errorf("%q", names)
	}
}
