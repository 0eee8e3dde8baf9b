package storm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
)

// errNothing is the answer of a damage that finds nothing to damage.
var errNothing = errors.New("nothing to damage")

// damage is a way to damage what is below dir.
type damage struct {
	name string
	do   func(dir string, rng *rand.Rand) error
}

// damages are the ways to damage the tree of a layer that show in its metadata. A
// change of content that keeps size and time shows only in what has content digests,
// which are taken after 15 seconds; tests/damage has it.
var damages = []damage{
	{"tree removed", func(dir string, _ *rand.Rand) error { return os.RemoveAll(dir) }},
	{"file removed", func(dir string, rng *rand.Rand) error {
		files, err := filesOf(dir, fs.FileMode.IsRegular)
		if len(files) == 0 {
			return errors.Join(err, errNothing)
		}
		return os.Remove(files[rng.IntN(len(files))])
	}},
	{"file truncated", func(dir string, rng *rand.Rand) error {
		files, err := filesOf(dir, fs.FileMode.IsRegular)
		files = slices.DeleteFunc(files, func(f string) bool { i, err := os.Lstat(f); return err != nil || i.Size() == 0 })
		if len(files) == 0 {
			return errors.Join(err, errNothing)
		}
		return os.Truncate(files[rng.IntN(len(files))], 0)
	}},
}

// removal of a directory has an actor of its own: layers above may have taken its
// owner and mode, or are about to.
var removal = damage{"directory removed", func(dir string, rng *rand.Rand) error {
	dirs, err := filesOf(dir, fs.FileMode.IsDir)
	if len(dirs) == 0 {
		return errors.Join(err, errNothing)
	}
	return os.RemoveAll(dirs[rng.IntN(len(dirs))])
}}

// filesOf lists what is below dir and of one kind.
func filesOf(dir string, is func(fs.FileMode) bool) (names []string, err error) {
	err = filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err == nil && name != dir && is(d.Type()) {
			names = append(names, name)
		}
		return err
	})
	return names, err
}

func (s *storm) actDamage(ctx context.Context, rng *rand.Rand) (string, error) {
	return s.damage(ctx, rng, damages[rng.IntN(len(damages))], false)
}

func (s *storm) actDirs(ctx context.Context, rng *rand.Rand) (string, error) {
	return s.damage(ctx, rng, removal, false)
}

func (s *storm) actNoBlob(ctx context.Context, rng *rand.Rand) (string, error) {
	return s.damage(ctx, rng, append(damages, removal)[rng.IntN(len(damages)+1)], true)
}

// actBlob breaks the blob of a layer, which stays whole.
func (s *storm) actBlob(ctx context.Context, rng *rand.Rand) (string, error) {
	s.node.onDisk.RLock()
	defer s.node.onDisk.RUnlock()
	img := s.images[rng.IntN(len(s.images))]
	d := img.Layers[rng.IntN(len(img.Layers))].Digest
	return fmt.Sprintf("of %s: %s", img.name, s.breakBlob(d, rng)), nil
}

// damage damages a layer of one namespace, and, on request, its blob.
func (s *storm) damage(ctx context.Context, rng *rand.Rand, d damage, blob bool) (string, error) {
	s.node.onDisk.RLock()
	defer s.node.onDisk.RUnlock()
	found, err := s.node.Daemon.Inspect(ctx)
	if err != nil || len(found.Layers) == 0 {
		return fmt.Sprintf("none: %v", err), nil
	}
	l := found.Layers[rng.IntN(len(found.Layers))]
	namespace, _, _ := strings.Cut(l.Name, "/")
	// It ends when everything is mended. A blob is that of all namespaces.
	s.ledger.disturb("damage: "+d.name, namespace, with(s.images, l.ChainID)...)
	s.damaged.Store(true)
	text := fmt.Sprintf("%s of %s (%d)", d.name, l.Name, l.ID)
	if blob {
		text += ", " + s.breakBlob(blobOf(s.images, l.ChainID), rng)
	}
	err = d.do(s.node.Daemon.LayerDir(l.ID), rng)
	return fmt.Sprintf("%s: %v", text, err), nil
}

// breakBlob removes a blob from containerd's store, or changes a byte of it.
func (s *storm) breakBlob(d digest.Digest, rng *rand.Rand) string {
	s.ledger.disturb("damage of blob "+d.String(), "", with(s.images, d.String())...)
	file := s.node.Blob(d)
	s.broken.Store(d, true)
	if rng.IntN(2) == 0 {
		return fmt.Sprintf("blob removed: %v", os.Remove(file))
	}
	good, err := os.ReadFile(file)
	if err == nil && len(good) > 0 {
		good[rng.IntN(len(good))] ^= 1
		err = replace(file, good)
	}
	return fmt.Sprintf("blob changed: %v", err)
}

// replace gives a file that is there another content, in one step.
func replace(file string, content []byte) error {
	if err := os.WriteFile(file+".storm", content, 0o444); err != nil {
		return err
	}
	return os.Rename(file+".storm", file)
}

// restoreBlobs puts good content where a blob is bad still: no process mends a blob under
// a layer that is whole, and the next pull of the layer would take it.
func (s *storm) restoreBlobs() (err error) {
	s.broken.Range(func(key, _ any) bool {
		d := key.(digest.Digest)
		s.broken.Delete(d)
		good := s.blobs[d]
		have, rerr := os.ReadFile(s.node.Blob(d))
		if rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
			err = errors.Join(err, rerr)
		} else if _, serr := os.Stat(filepath.Dir(s.node.Blob(d))); serr == nil && !bytes.Equal(have, good) {
			s.ledger.printf("restore blob %s", d)
			err = errors.Join(err, replace(s.node.Blob(d), good))
		}
		return true
	})
	return err
}
