package workload

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// wound is one way to damage a layer that can be seen without reading content.
// tree is where the layer lies, with its snapshot directory above it.
type wound struct {
	what    string
	inflict func(r *rand.Rand, tree string) error
	ofSeal  bool // the tree itself stays as it was
}

var wounds = []wound{
	{"a file is missing", toFile(os.Remove), false},
	{"a file is empty", toFile(func(path string) error { return os.Truncate(path, 0) }), false},
	{"a file has lost its last byte", toFile(func(path string) error { return resize(path, -1) }), false},
	{"a file is longer by one byte", toFile(func(path string) error { return resize(path, 1) }), false},
	{"a file has another mode", toFile(func(path string) error { return os.Chmod(path, 0o1717) }), false},
	{"a file has another owner", toFile(func(path string) error { return os.Lchown(path, 4321, 1234) }), false},
	{"a file has an attribute too many", toFile(func(path string) error { return unix.Lsetxattr(path, "user.extra", []byte("1"), 0) }), false},
	{"a file is a directory", toFile(func(path string) error { return errors.Join(os.Remove(path), os.Mkdir(path, 0o755)) }), false},
	{"there is a file too many", inTree(func(tree string) error { return os.WriteFile(filepath.Join(tree, "etc/extra"), nil, 0o644) }), false},
	{"a directory is missing", inTree(func(tree string) error { return os.RemoveAll(filepath.Join(tree, "etc")) }), false},
	{"everything in it is missing", inTree(func(tree string) error { return errors.Join(os.RemoveAll(tree), os.Mkdir(tree, 0o755)) }), false},
	{"the tree is missing", inTree(os.RemoveAll), false},
	{"the snapshot directory is missing", inTree(func(tree string) error { return os.RemoveAll(filepath.Dir(tree)) }), false},
	{"the seal is missing", inTree(func(tree string) error { return os.Remove(filepath.Join(filepath.Dir(tree), "seal")) }), true},
	{"the seal is cut off", inTree(func(tree string) error { return resize(filepath.Join(filepath.Dir(tree), "seal"), -10) }), true},
}

func inTree(do func(tree string) error) func(*rand.Rand, string) error {
	return func(_ *rand.Rand, tree string) error { return do(tree) }
}

// toFile does it to a file that is neither empty nor has another name.
func toFile(do func(path string) error) func(*rand.Rand, string) error {
	return func(r *rand.Rand, tree string) error {
		var files []string
		if err := filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			var st unix.Stat_t
			if err := unix.Lstat(path, &st); err != nil {
				return err
			}
			if st.Size > 0 && st.Nlink == 1 {
				files = append(files, path)
			}
			return nil
		}); err != nil {
			return err
		}
		return do(files[r.IntN(len(files))])
	}
}

func resize(path string, by int64) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	return os.Truncate(path, info.Size()+by)
}

// Hurt damages layers of a plan for healing by hand, as the seed of the plan has
// it, and notes it in the record. dirs has the trees of all layers. With
// everything, nothing is left of any.
func (r *Record) Hurt(p *Plan, dirs map[string]string, everything bool) error {
	if everything {
		for name, tree := range dirs {
			r.Damaged[name] = "snapshots/ is missing"
			if err := os.RemoveAll(filepath.Dir(filepath.Dir(tree))); err != nil {
				return fmt.Errorf("damage layers: %w", err)
			}
		}
		return nil
	}
	// The top of one chain stays whole: it must not be taken for damaged.
	below := p.Chains[asked].Layers
	patients := slices.Concat(below[:len(below)-1], p.Chains[removed].Layers)
	random := rand.New(rand.NewPCG(p.Seed, 0xd0c))
	order := random.Perm(len(wounds))
	// Of the first that heals, it must show whether it did.
	for wounds[order[0]].ofSeal {
		order = append(order[1:], order[0])
	}
	for i, l := range append(patients, p.Hopeless()) {
		w := wounds[order[i]]
		r.Damaged[l.Name] = w.what
		if err := w.inflict(random, dirs[l.Name]); err != nil {
			return fmt.Errorf("damage layer %s: %s: %w", l.Name, w.what, err)
		}
	}
	return nil
}
