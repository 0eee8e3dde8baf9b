package snapshotter

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// machine is a root and a content store that outlive daemons and boots.
type machine struct {
	*testing.T
	root, content string
	chainIDs      []string // of its image, the base first
	blobs         []digest.Digest
	boots         int
	damaged       chan *DamagedError
}

// newMachine has an image of so many layers in its content store.
func newMachine(t *testing.T, layers int) *machine {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("overlay mounts need root")
	}
	quiet(t)
	m := &machine{T: t, root: t.TempDir(), content: t.TempDir(), damaged: make(chan *DamagedError, 100)}
	var diffIDs []digest.Digest
	manifest := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for i := range layers {
		layer := layerTar(t, i)
		diffIDs = append(diffIDs, digest.FromBytes(layer))
		m.chainIDs = append(m.chainIDs, identity.ChainID(diffIDs).String())
		manifest.Layers = append(manifest.Layers, m.put(ocispec.MediaTypeImageLayer, layer))
		m.blobs = append(m.blobs, manifest.Layers[i].Digest)
	}
	manifest.Config = m.putJSON(ocispec.MediaTypeImageConfig, ocispec.Image{RootFS: ocispec.RootFS{Type: "layers", DiffIDs: diffIDs}})
	m.putJSON(ocispec.MediaTypeImageManifest, manifest)
	return m
}

// layerTar is layer i: files of its own, one that every layer has, and from the
// second layer on a whiteout and an opaque directory.
func layerTar(t *testing.T, i int) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(h tar.Header, content string) {
		h.Size, h.ModTime = int64(len(content)), time.Unix(1_600_000_000, 0)
		if _, err := w.Write(nil); err != nil {
			t.Fatal(err)
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	add(tar.Header{Typeflag: tar.TypeDir, Name: "dir/", Mode: 0o750, Uid: 7}, "")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "dir/shared", Mode: 0o644}, fmt.Sprint("of layer ", i))
	add(tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprint("dir/own", i), Mode: 0o4755}, strings.Repeat(fmt.Sprint("content ", i, "\n"), 1000))
	add(tar.Header{Typeflag: tar.TypeLink, Name: fmt.Sprint("hard", i), Linkname: fmt.Sprint("dir/own", i)}, "")
	add(tar.Header{Typeflag: tar.TypeSymlink, Name: "link", Linkname: "dir/shared"}, "")
	if i > 0 {
		add(tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprint("dir/.wh.own", i-1)}, "")
		add(tar.Header{Typeflag: tar.TypeReg, Name: "opaque/.wh..wh..opq"}, "")
	}
	add(tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprint("opaque/f", i), Mode: 0o600}, "x")
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func (m *machine) blob(d digest.Digest) string {
	return filepath.Join(m.content, "blobs", d.Algorithm().String(), d.Encoded())
}

func (m *machine) put(mediaType string, p []byte) ocispec.Descriptor {
	m.Helper()
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(p), Size: int64(len(p))}
	if err := errors.Join(os.MkdirAll(filepath.Dir(m.blob(d.Digest)), 0o755), os.WriteFile(m.blob(d.Digest), p, 0o444)); err != nil {
		m.Fatal(err)
	}
	return d
}

func (m *machine) putJSON(mediaType string, v any) ocispec.Descriptor {
	m.Helper()
	p, err := json.Marshal(v)
	if err != nil {
		m.Fatal(err)
	}
	return m.put(mediaType, p)
}

// boot starts a daemon, on a kernel that was booted anew unless same.
func (m *machine) boot(same bool) *Snapshotter {
	m.Helper()
	if !same {
		m.boots++
	}
	s, err := New(m.Context(), Config{
		Root: m.root, JournalHistory: 10, ContentRoot: m.content, BootID: fmt.Sprint("boot-", m.boots), NoBackground: true,
		OnDamaged: func(e *DamagedError) { m.damaged <- e },
	})
	if err != nil {
		m.Fatal(err)
	}
	m.Cleanup(func() { stop(m.T, s) })
	return s
}

// crash ends a daemon without its last words.
func crash(t *testing.T, s *Snapshotter) {
	t.Helper()
	s.closing.Do(func() {})
	stop(t, s)
}

// pull extracts the image the way containerd does.
func (m *machine) pull(s *Snapshotter) {
	m.Helper()
	parent := ""
	for i, chainID := range m.chainIDs {
		key := fmt.Sprintf("k8s.io/%d/extract-%d-x %s", 2*i, i, chainID)
		name := fmt.Sprintf("k8s.io/%d/%s", 2*i+1, chainID)
		if _, err := s.Prepare(m.Context(), key, parent); err != nil {
			m.Fatal(err)
		}
		dir := filepath.Join(s.dir(s.actives[key].id), "fs")
		opts := []archive.ApplyOpt{}
		if parent != "" {
			opts = append(opts, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout))
		}
		if _, err := archive.Apply(m.Context(), dir, bytes.NewReader(layerTar(m.T, i)), opts...); err != nil {
			m.Fatal(err)
		}
		if err := s.Commit(m.Context(), name, key); err != nil {
			m.Fatal(err)
		}
		parent = name
	}
}

func (m *machine) name(i int) string { return fmt.Sprintf("k8s.io/%d/%s", 2*i+1, m.chainIDs[i]) }

func (m *machine) tree(s *Snapshotter, i int) string {
	s.ready.mu.Lock()
	defer s.ready.mu.Unlock()
	return filepath.Join(s.dir(s.ready.layers[m.name(i)].entry.ID), "fs")
}

func (m *machine) state(s *Snapshotter, i int) string {
	s.ready.mu.Lock()
	defer s.ready.mu.Unlock()
	return s.ready.layers[m.name(i)].state.State
}

// wantStates compares the states of the layers with the words.
func (m *machine) wantStates(s *Snapshotter, when string, want ...string) {
	m.Helper()
	for i, w := range want {
		if have := m.state(s, i); have != w {
			m.Errorf("%s: layer %d is %s, want %s", when, i, have, w)
		}
	}
}

// wantWhole looks at all layers, also at their seals.
func (m *machine) wantWhole(s *Snapshotter) {
	m.Helper()
	for _, e := range journalOf(m.T, s).Committed {
		r, err := Check(m.Context(), m.root, e, CheckOptions{})
		if err != nil || r.State != storage.StateReady {
			m.Errorf("%s: %+v, %v", e.Name, r, err)
		}
	}
}

// TestBootsAndStates: what is known of layers survives a restart, a crash of the
// daemon, and a clean stop with a boot after it; not a boot without one.
func TestBootsAndStates(t *testing.T) {
	m := newMachine(t, 3)
	s := m.boot(false)
	m.pull(s)
	m.wantStates(s, "committed", "ready", "ready", "ready")
	crash(t, s)
	s = m.boot(true)
	m.wantStates(s, "killed in the same boot", "ready", "ready", "ready")
	stop(t, s)
	s = m.boot(false)
	m.wantStates(s, "clean stop, boot", "ready", "ready", "ready")
	crash(t, s)
	s = m.boot(false)
	m.wantStates(s, "unclean boot", "unverified", "unverified", "unverified")

	// The question about the second layer is one about the first, too.
	info, err := s.Stat(t.Context(), m.name(1))
	if err != nil {
		t.Fatal(err)
	}
	if info.Labels[labelState] != "ready" || info.Labels[labelStrategy] != storage.StrategySyncfs || info.Labels[labelSealed] == "" {
		t.Errorf("labels %v", info.Labels)
	}
	m.wantStates(s, "asked", "ready", "ready", "unverified")
	stop(t, s)
	s = m.boot(true)
	m.wantStates(s, "restarted before it had looked at all", "ready", "ready", "unverified")
	if _, err := s.Prepare(t.Context(), "container", m.name(2)); err != nil {
		t.Fatal(err)
	}
	m.wantStates(s, "used", "ready", "ready", "ready")
	crash(t, s)
	s = m.boot(false)
	if _, err := s.Mounts(t.Context(), "container"); err != nil {
		t.Fatal(err)
	}
	m.wantStates(s, "mounted", "ready", "ready", "ready")
}

// TestStateIsNotALabel: a client that writes back the labels it was told does
// not store what was never its to say.
func TestStateIsNotALabel(t *testing.T) {
	m := newMachine(t, 1)
	s := m.boot(false)
	m.pull(s)
	info, err := s.Stat(t.Context(), m.name(0))
	if err != nil {
		t.Fatal(err)
	}
	info.Labels["mine"] = "yes"
	if _, err := s.Update(t.Context(), info); err != nil {
		t.Fatal(err)
	}
	r, err := s.Inspect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(r.Snapshots[0].Labels); got != "map[mine:yes]" {
		t.Errorf("stored labels %s", got)
	}
}

// TestHeal damages layers and asks for the topmost one, in the same boot and
// after an unclean one.
func TestHeal(t *testing.T) {
	for _, boot := range []bool{false, true} {
		for name, c := range map[string]struct {
			damage func(m *machine, s *Snapshotter) error
			same   bool // seen without a look
		}{
			"file removed": {damage: func(m *machine, s *Snapshotter) error { return os.Remove(filepath.Join(m.tree(s, 1), "link")) }},
			"file emptied": {damage: func(m *machine, s *Snapshotter) error { return os.Truncate(filepath.Join(m.tree(s, 2), "hard2"), 0) }},
			"all damaged": {damage: func(m *machine, s *Snapshotter) error {
				return errors.Join(os.Remove(filepath.Join(m.tree(s, 0), "link")), os.Remove(filepath.Join(m.tree(s, 1), "link")), os.Remove(filepath.Join(m.tree(s, 2), "link")))
			}},
			"tree removed":  {func(m *machine, s *Snapshotter) error { return os.RemoveAll(m.tree(s, 1)) }, true},
			"layer removed": {func(m *machine, s *Snapshotter) error { return os.RemoveAll(filepath.Dir(m.tree(s, 0))) }, true},
			"a file instead": {func(m *machine, s *Snapshotter) error {
				dir := filepath.Dir(m.tree(s, 2))
				return errors.Join(os.RemoveAll(dir), os.WriteFile(dir, nil, 0o600))
			}, true},
			"tree a link": {func(m *machine, s *Snapshotter) error {
				tree := m.tree(s, 1)
				return errors.Join(os.RemoveAll(tree), os.Symlink("/", tree))
			}, true},
			"all removed": {func(m *machine, s *Snapshotter) error { return os.RemoveAll(s.snapshotsDir()) }, true},
			"seal removed": {damage: func(m *machine, s *Snapshotter) error {
				return os.Remove(filepath.Join(filepath.Dir(m.tree(s, 1)), sealFile))
			}},
			"nothing damaged": {damage: func(m *machine, s *Snapshotter) error { return nil }},
		} {
			if !boot && !c.same {
				continue
			}
			t.Run(fmt.Sprintf("%s boot=%t", name, boot), func(t *testing.T) {
				m := newMachine(t, 3)
				s := m.boot(false)
				m.pull(s)
				before := journalOf(t, s)
				if err := c.damage(m, s); err != nil {
					t.Fatal(err)
				}
				if boot {
					crash(t, s)
					s = m.boot(false)
				}
				if _, err := s.Prepare(t.Context(), "container", m.name(2)); err != nil {
					t.Fatal(err)
				}
				m.wantStates(s, "healed", "ready", "ready", "ready")
				m.wantWhole(s)
				for i, e := range journalOf(t, s).Committed {
					old := before.Committed[i]
					if e.ID != old.ID || e.Name != old.Name || e.Sequence != old.Sequence || e.Entries != old.Entries || e.Bytes != old.Bytes {
						t.Errorf("healed to another layer: %+v, was %+v", e, old)
					}
				}
				stop(t, s)
				s = m.boot(false)
				m.wantStates(s, "after a clean boot", "ready", "ready", "ready")
				if left, err := filepath.Glob(filepath.Join(m.root, "replaced", "*")); err != nil || len(left) > 0 {
					t.Errorf("kept over a boot: %v, %v", left, err)
				}
			})
		}
	}
}

// TestHealLooksBelow: the question is about one layer, of which the parents are
// known to be ready, and are not.
func TestHealLooksBelow(t *testing.T) {
	m := newMachine(t, 3)
	s := m.boot(false)
	m.pull(s)
	if err := os.RemoveAll(s.snapshotsDir()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Stat(t.Context(), m.name(2)); err != nil {
		t.Fatal(err)
	}
	m.wantWhole(s)
}

// TestHealKeepsWhatMountsUse: a healing after one that failed late finds the
// damaged tree where it builds, and does not delete it.
func TestHealKeepsWhatMountsUse(t *testing.T) {
	m := newMachine(t, 1)
	s := m.boot(false)
	m.pull(s)
	if err := os.Remove(filepath.Join(m.tree(s, 0), "link")); err != nil {
		t.Fatal(err)
	}
	late := filepath.Join(s.healingDir(), filepath.Base(filepath.Dir(m.tree(s, 0))))
	if err := os.MkdirAll(late, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(late, "in-use"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Repair(t.Context(), RepairOptions{Apply: true}); err != nil {
		t.Fatal(err)
	}
	m.wantWhole(s)
	if kept, err := filepath.Glob(filepath.Join(s.replacedDir(), "*", "in-use")); err != nil || len(kept) != 1 {
		t.Errorf("kept %v, %v", kept, err)
	}
}

// TestRepair: a plan changes nothing, and what is applied is what was planned.
func TestRepair(t *testing.T) {
	m := newMachine(t, 2)
	s := m.boot(false)
	m.pull(s)
	if err := os.Remove(filepath.Join(m.tree(s, 1), "link")); err != nil {
		t.Fatal(err)
	}
	planned, err := s.Repair(t.Context(), RepairOptions{})
	if err != nil || len(planned) != 1 || planned[0].Blob != m.blobs[1].String() || planned[0].Healed || planned[0].Findings[0].Path != "." && planned[0].Findings[0].Path != "link" {
		t.Fatalf("%+v, %v", planned, err)
	}
	m.wantStates(s, "planned", "ready", "ready")
	stop(t, s)
	cfg := Config{Root: m.root, ContentRoot: m.content, BootID: "boot-1"}
	stopped, err := RepairRoot(t.Context(), cfg, RepairOptions{})
	if err != nil || len(stopped) != 1 || stopped[0].Plan != planned[0].Plan {
		t.Fatalf("%+v, %v", stopped, err)
	}
	done, err := RepairRoot(t.Context(), cfg, RepairOptions{Apply: true})
	if err != nil || len(done) != 1 || !done[0].Healed || done[0].State != storage.StateReady {
		t.Fatalf("%+v, %v", done, err)
	}
	s = m.boot(true)
	m.wantWhole(s)
	if nothing, err := s.Repair(t.Context(), RepairOptions{Deep: true}); err != nil || len(nothing) > 0 {
		t.Errorf("%+v, %v", nothing, err)
	}
}

// TestStaleLook: what a look found that began before the layer was damaged, or
// was replaced, is not what is known of it.
func TestStaleLook(t *testing.T) {
	m := newMachine(t, 1)
	s := m.boot(false)
	m.pull(s)
	e := journalOf(t, s).Committed[0]
	l := s.ready.layer(e)
	look, err := Check(t.Context(), m.root, e, CheckOptions{})
	if err != nil || look.State != storage.StateReady {
		t.Fatal(look, err)
	}
	if err := errors.Join(os.RemoveAll(m.tree(s, 0)), os.Remove(m.blob(m.blobs[0]))); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Stat(t.Context(), m.name(0)); err == nil {
		t.Fatal("a tree that is gone is said to be there")
	}
	s.noteLook(t.Context(), l, e, look, false)
	m.wantStates(s, "an older look", "damaged")

	look, err = Check(t.Context(), m.root, e, CheckOptions{})
	if err != nil || look.State != storage.StateDamaged {
		t.Fatal(look, err)
	}
	m.put(ocispec.MediaTypeImageLayer, layerTar(t, 0))
	if _, err := s.Repair(t.Context(), RepairOptions{Apply: true}); err != nil {
		t.Fatal(err)
	}
	look.Checked = time.Now().Add(time.Hour)
	s.noteLook(t.Context(), l, e, look, false)
	m.wantStates(s, "a look at the tree that was replaced", "ready")
}

// TestNeverSealed: a layer of the built-in snapshotter is taken as it is, until
// somebody names it to repair.
func TestNeverSealed(t *testing.T) {
	m := newMachine(t, 1)
	builtin, err := overlay.NewSnapshotter(m.root)
	if err != nil {
		t.Fatal(err)
	}
	addLayer(t, builtin, m.name(0)[strings.Index(m.name(0), "sha256"):], "")
	if err := builtin.Close(); err != nil {
		t.Fatal(err)
	}
	s := m.boot(false)
	name := m.chainIDs[0]
	info, err := s.Stat(t.Context(), name)
	if err != nil || info.Labels[labelState] != "unverified" {
		t.Fatalf("%+v, %v", info, err)
	}
	if e := journalOf(t, s).Committed[0]; e.ChainID != name {
		t.Errorf("reported without its chain ID, by which people name it: %+v", e)
	}
	if results, err := s.Repair(t.Context(), RepairOptions{Apply: true}); err != nil || len(results) != 1 || results[0].Healed {
		t.Errorf("not named: %+v, %v", results, err)
	}
	results, err := s.Repair(t.Context(), RepairOptions{Apply: true, IDs: []uint64{results(t, s)[0].ID}})
	if err != nil || len(results) != 1 || !results[0].Healed {
		t.Fatalf("named: %+v, %v", results, err)
	}
	m.wantWhole(s)
	if e := journalOf(t, s).Committed[0]; e.Strategy != storage.StrategyHealed || e.Digest == "" {
		t.Errorf("journal %+v", e)
	}
}

func results(t *testing.T, s *Snapshotter) []CheckResult {
	t.Helper()
	r, err := s.Inspect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return r.Layers
}

// TestNotHealed: without its blob a damaged layer is refused, everything that
// says what exists goes on, and the blob heals it when it comes back.
func TestNotHealed(t *testing.T) {
	for name, hide := range map[string]func(path string) error{
		"missing":   os.Remove,
		"truncated": func(path string) error { return os.Truncate(path, 100) },
		"flipped": func(path string) error {
			p, err := os.ReadFile(path)
			p[len(p)/2] ^= 1
			return errors.Join(err, os.WriteFile(path, p, 0o644))
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, 3)
			s := m.boot(false)
			m.pull(s)
			blob := m.blob(m.blobs[1])
			saved, err := os.ReadFile(blob)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(hide(blob), os.RemoveAll(m.tree(s, 1))); err != nil {
				t.Fatal(err)
			}
			refused := func(what string, err error) {
				t.Helper()
				var damaged *DamagedError
				if !errors.As(err, &damaged) || damaged.ChainID != m.chainIDs[1] || damaged.Reason == "" || !errdefs.IsFailedPrecondition(err) {
					t.Errorf("%s: %v", what, err)
				}
			}
			for range 2 { // the second in the same boot, with a daemon that only read of it
				_, err = s.Prepare(t.Context(), "container", m.name(2))
				refused("prepare", err)
				_, err = s.View(t.Context(), "view", m.name(1))
				refused("view", err)
				_, err = s.Stat(t.Context(), m.name(2))
				refused("stat", err)
				if _, err := s.Stat(t.Context(), m.name(0)); err != nil {
					t.Errorf("the layer below: %v", err)
				}
				walked := 0
				if err := s.Walk(t.Context(), func(context.Context, snapshots.Info) error { walked++; return nil }); err != nil || walked != 3 {
					t.Errorf("walk: %d, %v", walked, err)
				}
				if _, err := s.Usage(t.Context(), m.name(1)); err != nil {
					t.Errorf("usage: %v", err)
				}
				if told := <-m.damaged; told.ChainID != m.chainIDs[1] {
					t.Errorf("told of %v", told)
				}
				crash(t, s)
				s = m.boot(true)
				m.wantStates(s, "restarted", "ready", "damaged", "ready")
			}
			if err := os.WriteFile(blob, saved, 0o644); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Prepare(t.Context(), "container", m.name(2)); err != nil {
				t.Errorf("with its blob again: %v", err)
			}
			if err := errors.Join(s.Remove(t.Context(), "container"), s.Remove(t.Context(), m.name(2))); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestManyAsk: one look and one healing serve everybody who asks.
func TestManyAsk(t *testing.T) {
	m := newMachine(t, 3)
	s := m.boot(false)
	m.pull(s)
	if err := os.Remove(filepath.Join(m.tree(s, 0), "link")); err != nil {
		t.Fatal(err)
	}
	crash(t, s)
	s = m.boot(false)
	var asking sync.WaitGroup
	for i := range 50 {
		asking.Go(func() {
			if _, err := s.Prepare(t.Context(), fmt.Sprint("container", i), m.name(2)); err != nil {
				t.Error(err)
			}
		})
	}
	asking.Wait()
	if replaced, err := os.ReadDir(s.replacedDir()); err != nil || len(replaced) != 1 {
		t.Errorf("healed %d times: %v", len(replaced), err)
	}
}

// TestAskingEnds: whoever has no time is told so, and the work goes on.
func TestAskingEnds(t *testing.T) {
	m := newMachine(t, 2)
	s := m.boot(false)
	m.pull(s)
	crash(t, s)
	s = m.boot(false)
	s.ready.looks <- struct{}{} // looks wait
	s.ready.looks <- struct{}{}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := s.Stat(ctx, m.name(1)); !errdefs.IsUnavailable(err) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	<-s.ready.looks
	if _, err := s.Stat(t.Context(), m.name(1)); err != nil {
		t.Error(err)
	}
	<-s.ready.looks
}

// TestBackgroundAboveDamage: nobody asks, and what stands on a layer that stays
// damaged is looked at all the same.
func TestBackgroundAboveDamage(t *testing.T) {
	m := newMachine(t, 3)
	s := m.boot(false)
	m.pull(s)
	if err := errors.Join(os.Remove(filepath.Join(m.tree(s, 0), "link")), os.Remove(m.blob(m.blobs[0])), os.Remove(filepath.Join(m.tree(s, 2), "link"))); err != nil {
		t.Fatal(err)
	}
	crash(t, s)
	s, err := New(t.Context(), Config{Root: m.root, ContentRoot: m.content, BootID: "other"})
	if err != nil {
		t.Fatal(err)
	}
	defer stop(t, s)
	for deadline := time.Now().Add(20 * time.Second); len(s.ready.in(storage.StateUnverified, storage.StateHealing)) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("not all were looked at")
		}
	}
	// The topmost would inherit from the damaged one.
	m.wantStates(s, "looked at", "damaged", "ready", "damaged")
}

// TestBackground: nobody asks, and all layers are looked at and healed.
func TestBackground(t *testing.T) {
	m := newMachine(t, 3)
	s := m.boot(false)
	m.pull(s)
	if err := os.Remove(filepath.Join(m.tree(s, 1), "link")); err != nil {
		t.Fatal(err)
	}
	crash(t, s)
	s, err := New(t.Context(), Config{Root: m.root, ContentRoot: m.content, BootID: "other"})
	if err != nil {
		t.Fatal(err)
	}
	defer stop(t, s)
	for deadline := time.Now().Add(20 * time.Second); len(s.ready.in(storage.StateUnverified, storage.StateDamaged, storage.StateHealing)) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("not all are ready")
		}
	}
	m.wantWhole(s)
}
