package layers

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Entries of tars.
var (
	tarOf  = treetest.TarOf
	dir    = treetest.TarDir
	file   = treetest.TarFile
	opaque = treetest.TarOpaque
)

// attributesAt are the mode, owner and attributes of a directory, as text.
func attributesAt(t *testing.T, path string) string {
	t.Helper()
	e, err := seal.Read(path, ".")
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%o %d:%d %.40v", e.Stat.Mode&^unix.S_IFMT, e.Stat.Uid, e.Stat.Gid, inheritable(&e))
}

// private is a directory that only its owner may read.
func private(name string) tar.Header {
	h := dir(name, 0o700, 1000)
	h.Gid = 1001
	h.PAXRecords = map[string]string{"SCHILY.xattr.user.kind": "d"}
	return h
}

const isPrivate = "700 1000:1001 [{user.kind d}]"

// inheritable are the attributes that copying a directory up would bring along.
func inheritable(e *seal.Entry) []seal.Xattr {
	return slices.DeleteFunc(slices.Clone(e.Xattrs), func(x seal.Xattr) bool { return !seal.Inheritable(x.Name) })
}

func xattrsOf(t *testing.T, path string) string {
	t.Helper()
	e, err := seal.Read(path, ".")
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(e.Xattrs)
}

// apply extracts entries into a layer.
func apply(t *testing.T, upper string, headers ...tar.Header) {
	t.Helper()
	if _, err := archive.Apply(t.Context(), upper, tarOf(t, headers), archive.WithConvertWhiteout(archive.OverlayConvertWhiteout)); err != nil {
		t.Fatal(err)
	}
}

// bases is an image whose last layer puts something into directories of the base and
// has no entries of them, but one.
func bases(t *testing.T) *machine {
	t.Helper()
	own := dir("own", 0o711, 3) // not what the base has
	return newMachineOf(t, [][]byte{
		tarOf(t, []tar.Header{private("priv"), dir("own", 0o700, 2), dir("more", 0o750, 4), file("more/low")}).Bytes(),
		tarOf(t, []tar.Header{file("between")}).Bytes(),
		tarOf(t, []tar.Header{file("priv/x/y"), own, file("own/z"), file("more/new")}).Bytes(),
		tarOf(t, []tar.Header{file("priv/x/top")}).Bytes(),
	})
}

// TestInheritWithoutSeal: when the seal of a parent is lost, Commit is refused and
// nothing is sealed; the parent is verified and healed, and the next extraction
// succeeds. A layer that needs no attributes of others does not mind.
func TestInheritWithoutSeal(t *testing.T) {
	other := t.TempDir()
	for name, spoil := range map[string]func(file string) error{
		"missing": os.Remove,
		"corrupt": func(file string) error {
			b, err := os.ReadFile(file)
			b[len(b)/2] ^= 0x10
			return errors.Join(err, os.WriteFile(file, b, 0o600))
		},
		"of another tree": func(file string) error {
			_, err := seal.Write(context.Background(), other, file)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := bases(t)
			s := m.boot(false)
			m.pull(s)
			before := m.entry(s, 0)
			if err := spoil(filepath.Join(s.root.Dir(before.ID), layout.SealFile)); err != nil {
				t.Fatal(err)
			}
			commit := func(n int, header tar.Header) error {
				t.Helper()
				key := fmt.Sprintf("k8s.io/%d/extract-%d-x sha256:%064x", 100+n, n, n)
				mounts, err := s.Prepare(t.Context(), key, m.name(1))
				if err != nil {
					t.Fatal(err)
				}
				apply(t, treetest.UpperDir(mounts), header)
				return s.Commit(t.Context(), fmt.Sprintf("k8s.io/%d/sha256:%064x", 200+n, n), key)
			}
			if err := commit(1, dir("has-an-entry", 0o700, 1)); err != nil {
				t.Errorf("nothing to inherit: %v", err)
			}
			err := commit(2, file("priv/in"))
			if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), fmt.Sprintf("snapshots/%d", before.ID)) {
				t.Fatalf("Commit without the parent's seal: %v", err)
			}
			if _, err := s.Stat(t.Context(), fmt.Sprintf("k8s.io/202/sha256:%064x", 2)); !errdefs.IsNotFound(err) {
				t.Errorf("it is there: %v", err)
			}
			// The question waits until the parent is verified and healed.
			if _, err := s.Stat(t.Context(), m.name(1)); err != nil {
				t.Fatal(err)
			}
			if now := m.entry(s, 0); now.Digest == before.Digest || now.Strategy != storage.StrategyHealed {
				t.Errorf("the parent was not healed: %+v", now)
			}
			if err := commit(3, file("priv/in")); err != nil {
				t.Fatal(err)
			}
			m.wantWhole(s)
		})
	}
}

// TestInheritLostValue: a long value is not in the seal. A parent that has lost it is
// verified, and nothing is sealed without it.
func TestInheritLostValue(t *testing.T) {
	h := private("priv")
	long := strings.Repeat("v", 2000)
	h.PAXRecords = map[string]string{"SCHILY.xattr.user.long": long}
	m := newMachineOf(t, [][]byte{tarOf(t, []tar.Header{h}).Bytes(), tarOf(t, []tar.Header{file("priv/x")}).Bytes()})
	s := m.boot(false)
	m.pull(s)
	path := filepath.Join(m.tree(s, 0), "priv")
	commit := func(n int) error {
		t.Helper()
		key := fmt.Sprintf("k8s.io/%d/extract-%d-x sha256:%064x", 100+n, n, n)
		mounts, err := s.Prepare(t.Context(), key, m.name(0))
		if err != nil {
			t.Fatal(err)
		}
		upper := treetest.UpperDir(mounts)
		apply(t, upper, file("priv/in"))
		err = s.Commit(t.Context(), fmt.Sprintf("k8s.io/%d/sha256:%064x", 200+n, n), key)
		if value := make([]byte, 3000); err == nil {
			if size, err := unix.Getxattr(filepath.Join(upper, "priv"), "user.long", value); err != nil || string(value[:size]) != long {
				t.Errorf("inherited %d bytes, %v", size, err)
			}
		}
		return err
	}
	if err := commit(1); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setxattr(path, "user.long", []byte(long+"changed"), 0); err != nil {
		t.Fatal(err)
	}
	if err := commit(2); !errdefs.IsUnavailable(err) {
		t.Errorf("a value that is not the sealed one: %v", err)
	}
	if _, err := s.Stat(t.Context(), m.name(0)); err != nil {
		t.Fatal(err)
	}
	if err := commit(3); err != nil {
		t.Errorf("after the parent was healed: %v", err)
	}
}

// inheritedFromDisk makes a layer what a version would have made of it that took
// attributes from the disk, while the layers below had lost its directories: as the
// applier leaves them, and sealed so.
func (m *machine) inheritedFromDisk(s *daemon, i int, rels ...string) {
	m.Helper()
	tree := m.tree(s, i)
	for _, rel := range rels {
		path := filepath.Join(tree, rel)
		_ = unix.Removexattr(path, "user.kind")
		if err := errors.Join(os.Chown(path, 0, 0), os.Chmod(path, 0o755)); err != nil {
			m.Fatal(err)
		}
	}
	e := m.entry(s, i)
	c, err := seal.Write(m.Context(), tree, filepath.Join(filepath.Dir(tree), layout.SealFile))
	if err != nil {
		m.Fatal(err)
	}
	e.Digest = c.Digest
	r, err := layout.ReadRecord(filepath.Dir(tree))
	if err != nil {
		m.Fatal(err)
	}
	r.Digest = c.Digest
	if err := errors.Join(layout.ReplaceRecordSync(filepath.Dir(tree), r), s.layers.gate.Update(m.Context(), nil, func(_ context.Context, j *storage.Journal) error {
		return j.Replace(e)
	})); err != nil {
		m.Fatal(err)
	}
	s.layers.table.mu.Lock()
	s.layers.table.layers[m.name(i)].entry.Digest = c.Digest
	s.layers.table.mu.Unlock()
}

// waitPrivate waits until the directories of layers 2 and 3 have what their tars say.
func (m *machine) waitPrivate(s *daemon) {
	m.Helper()
	want := map[string]string{"priv": isPrivate, "own": "711 3:3 []", "more": "750 4:4 []"}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		wrong := ""
		for rel, w := range want {
			if got := attributesAt(m.T, filepath.Join(m.tree(s, 2), rel)); got != w {
				wrong = fmt.Sprintf("layer 2 has %s %s, want %s", rel, got, w)
			}
		}
		if got := attributesAt(m.T, filepath.Join(m.tree(s, 3), "priv")); got != isPrivate {
			wrong = "layer 3 has priv " + got
		}
		if wrong == "" {
			break
		}
		if time.Now().After(deadline) {
			m.Fatal(wrong)
		}
	}
}

// TestInheritedIsMended: layers that were sealed with what a damaged parent had are
// found and extracted again when the parent is healed, by the next daemon when it was
// healed before, and by a deep verification.
func TestInheritedIsMended(t *testing.T) {
	for name, find := range map[string]func(m *machine, s *daemon) *daemon{
		"parent healed": func(m *machine, s *daemon) *daemon {
			if err := os.RemoveAll(filepath.Join(m.tree(s, 0), "priv")); err != nil {
				m.Fatal(err)
			}
			m.repair(s, RepairOptions{IDs: []uint64{m.entry(s, 0).ID}, Apply: true})
			return s
		},
		"started with a healed parent": func(m *machine, s *daemon) *daemon {
			e := m.entry(s, 0)
			e.Strategy = storage.StrategyHealed
			if err := s.layers.gate.Update(m.Context(), nil, func(_ context.Context, j *storage.Journal) error { return j.Replace(e) }); err != nil {
				m.Fatal(err)
			}
			stop(m.T, s)
			m.config = func(c *DaemonConfig) { c.NoBackground = false }
			return m.boot(true)
		},
		"repair --deep": func(m *machine, s *daemon) *daemon {
			results := m.repair(s, RepairOptions{Deep: true, Apply: true})
			// The layer above may be healed before it is its turn.
			if len(results) == 0 || !results[0].Healed || results[0].ID != m.entry(s, 2).ID {
				m.Errorf("repair: %+v", results)
			}
			return s
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := bases(t)
			s := m.boot(false)
			m.pull(s)
			m.waitPrivate(s)
			m.inheritedFromDisk(s, 2, "priv", "more")
			m.inheritedFromDisk(s, 3, "priv")
			m.wantWhole(s) // by their own seals
			between := m.entry(s, 1)
			s = find(m, s)
			m.waitPrivate(s)
			// All work on them has come to an end.
			for i := range 4 {
				if _, err := s.Stat(t.Context(), m.name(i)); err != nil {
					t.Error(err)
				}
			}
			m.wantStates(s, "mended", "ready", "ready", "ready", "ready")
			m.wantWhole(s)
			if now := m.entry(s, 1); now.Digest != between.Digest {
				t.Error("a layer that inherits nothing was replaced")
			}
			if results := m.repair(s, RepairOptions{Deep: true}); len(results) != 0 {
				t.Errorf("found afterwards: %+v", results)
			}
			select {
			case e := <-m.damaged:
				t.Errorf("reported for dropping: %v", e)
			default:
			}
		})
	}
}

// TestInheritedWithoutBlob: without its tar it is not known whether a directory has
// inherited what it has. Nothing is changed, and damage that was found before stays.
func TestInheritedWithoutBlob(t *testing.T) {
	m := bases(t)
	s := m.boot(false)
	m.pull(s)
	m.digestAllNow(s)
	m.inheritedFromDisk(s, 2, "priv")
	blob := m.Blob(m.Blobs[2])
	if err := os.Rename(blob, blob+"-away"); err != nil {
		t.Fatal(err)
	}
	l, before := m.layer(s, 2), m.entry(s, 2)
	s.layers.compareInherited(t.Context(), l)
	if _, err := s.layers.inherited.findings(t.Context(), l, before); !errors.Is(err, errNoTar) {
		t.Errorf("without a blob: %v", err)
	}
	m.wantStates(s, "without a blob", "ready", "ready", "ready", "ready")

	// Found while the blob was there, and it is gone when it is to be mended.
	if err := os.Rename(blob+"-away", blob); err != nil {
		t.Fatal(err)
	}
	s.layers.healing <- struct{}{}
	ended := make(chan struct{})
	go func() { defer close(ended); s.layers.compareInherited(t.Context(), l) }()
	for deadline := time.Now().Add(time.Minute); m.state(s, 2) != storage.StateDamaged; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("not found")
		}
	}
	if err := os.Rename(blob, blob+"-away"); err != nil {
		t.Fatal(err)
	}
	<-s.layers.healing
	<-ended
	if _, e := s.layers.table.current(l); e.Digest != before.Digest {
		t.Error("the tree was replaced")
	}
	m.wantStates(s, "found", "ready", "ready", "damaged", "ready")
	select {
	case e := <-m.damaged:
		if e.NoBlob {
			t.Errorf("reported for dropping: %v", e)
		}
	default:
	}
	// Its own seal does not disprove it, nor does a deep verification that cannot read
	// the tar; one that can does.
	m.repair(s, RepairOptions{Apply: true})
	m.repair(s, RepairOptions{Deep: true, Apply: true})
	m.wantStates(s, "verified without a blob", "ready", "ready", "damaged", "ready")
	if err := os.Rename(blob+"-away", blob); err != nil {
		t.Fatal(err)
	}
	if results := m.repair(s, RepairOptions{Deep: true, Apply: true}); len(results) != 1 || !results[0].Healed {
		t.Errorf("%+v", results)
	}
	m.waitPrivate(s)
}

// TestHiddenIsMended: an opaque root that does not hide what its parents have is found,
// as is a directory in it.
func TestHiddenIsMended(t *testing.T) {
	m := newMachineOf(t, [][]byte{
		tarOf(t, []tar.Header{dir("both", 0o700, 5), file("both/low"), file("low")}).Bytes(),
		tarOf(t, []tar.Header{opaque("."), file("both/own"), file("own")}).Bytes(),
	})
	s := m.boot(false)
	m.pull(s)
	if results := m.repair(s, RepairOptions{Deep: true, Apply: true}); len(results) != 0 {
		t.Fatalf("whole: %+v", results)
	}
	tree := m.tree(s, 1)
	if err := errors.Join(os.Remove(filepath.Join(tree, "low")), unix.Removexattr(filepath.Join(tree, "both"), "trusted.overlay.opaque")); err != nil {
		t.Fatal(err)
	}
	m.inheritedFromDisk(s, 1)
	results := m.repair(s, RepairOptions{Deep: true, Apply: true})
	if len(results) != 1 || !results[0].Healed || len(results[0].Findings) != 2 {
		t.Fatalf("%+v", results)
	}
	if got := xattrsOf(t, filepath.Join(m.tree(s, 1), "both")); got != "[{trusted.overlay.opaque y}]" {
		t.Errorf("both has %s", got)
	}
	if _, err := os.Lstat(filepath.Join(m.tree(s, 1), "low")); err != nil {
		t.Error(err)
	}
}

// TestInheritedOwnSeal: a layer whose own seal is found lost in a comparison is
// verified and healed, as by any other verification.
func TestInheritedOwnSeal(t *testing.T) {
	m := bases(t)
	s := m.boot(false)
	m.pull(s)
	before := m.entry(s, 2)
	if err := os.Remove(filepath.Join(s.root.Dir(before.ID), layout.SealFile)); err != nil {
		t.Fatal(err)
	}
	s.layers.compareInherited(t.Context(), m.layer(s, 2))
	for deadline := time.Now().Add(time.Minute); m.entry(s, 2).Digest == before.Digest || m.state(s, 2) != storage.StateReady; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the layer is %s", m.state(s, 2))
		}
	}
	m.wantWhole(s)
}

// TestInheritedInAnotherSpace: after a change of mount_options nothing is known.
func TestInheritedInAnotherSpace(t *testing.T) {
	m := bases(t)
	s := m.boot(false)
	m.pull(s)
	m.inheritedFromDisk(s, 2, "priv")
	stop(t, s)
	m.config = func(c *DaemonConfig) { c.MountOptions = []string{"userxattr"} }
	s = m.boot(true)
	if results := m.repair(s, RepairOptions{Deep: true, Apply: true}); len(results) != 0 {
		t.Errorf("%+v", results)
	}
}

// TestSameAsExtracted: a layer that was committed is never found different from the
// layers below, whatever its tar has.
func TestSameAsExtracted(t *testing.T) {
	var tars [][]byte
	for i := range 4 {
		entries := []tar.Header{private(fmt.Sprint("d", i)), dir("common", int64(0o700+i), i), file(fmt.Sprintf("d%d/in/f", i))}
		for j := range i {
			if i == 2 && j == 1 {
				continue // has a whiteout
			}
			entries = append(entries, file(fmt.Sprintf("d%d/in/of%d", j, i)), file(fmt.Sprintf("d%d/new%d/f", j, i)))
		}
		if i == 2 {
			entries = append(entries, opaque("d0"), file(".wh.d1"))
		}
		tars = append(tars, tarOf(t, entries).Bytes())
	}
	m := newMachineOf(t, tars)
	s := m.boot(false)
	m.pull(s)
	before := onRecord(t, s).Entries
	if results := m.repair(s, RepairOptions{Deep: true, Apply: true}); len(results) != 0 {
		t.Errorf("found: %+v", results)
	}
	if now := onRecord(t, s).Entries; fmt.Sprint(now) != fmt.Sprint(before) {
		t.Errorf("journal %v, was %v", now, before)
	}
	for i := range 4 {
		s.layers.table.mu.Lock()
		agrees := s.layers.table.layers[m.name(i)].agrees
		s.layers.table.mu.Unlock()
		if (agrees != "") != (i > 0) {
			t.Errorf("layer %d was compared with %q", i, agrees)
		}
	}
}
