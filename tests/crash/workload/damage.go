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
	{"a file has a capability", toFile(func(path string) error { return unix.Lsetxattr(path, "security.capability", netBind, 0) }), false},
	{"a file is a directory", toFile(func(path string) error { return errors.Join(os.Remove(path), os.Mkdir(path, 0o755)) }), false},
	{"there is a file too many", inTree(func(tree string) error { return os.WriteFile(filepath.Join(tree, "etc/extra"), nil, 0o644) }), false},
	{"a directory is missing", inTree(func(tree string) error { return os.RemoveAll(filepath.Join(tree, "etc")) }), false},
	{"everything in it is missing", inTree(func(tree string) error { return errors.Join(os.RemoveAll(tree), os.Mkdir(tree, 0o755)) }), false},
	{"the tree is missing", inTree(os.RemoveAll), false},
	{"the snapshot directory is missing", inTree(func(tree string) error { return os.RemoveAll(filepath.Dir(tree)) }), false},
	{"the seal is missing", inTree(func(tree string) error { return os.Remove(filepath.Join(filepath.Dir(tree), "seal")) }), true},
	{"the seal is cut off", inTree(func(tree string) error { return resize(filepath.Join(filepath.Dir(tree), "seal"), -10) }), true},
}

// netBind is an attribute of revision 2 (VFS_CAP_REVISION_2, capabilities(7)) that
// gives a program CAP_NET_BIND_SERVICE. Other attributes that are added to a file
// may be harmless.
var netBind = []byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

// corruption changes content and nothing else: only a comparison of content finds
// it.
var corruption = wound{"a file has another byte", toFile(flip), false}

// flip changes the byte in the middle of a file and leaves all that a comparison
// of metadata sees as it was.
func flip(path string) (err error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	var b [1]byte
	at := st.Size / 2
	if _, err := f.ReadAt(b[:], at); err != nil {
		return err
	}
	b[0] ^= 0xff
	if _, err := f.WriteAt(b[:], at); err != nil {
		return err
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
}

// Inflict damages one layer in a way that the random numbers choose, and notes it
// in the record. tree is where the layer lies.
func (r *Record) Inflict(random *rand.Rand, name, tree string) error {
	return r.inflict(random, wounds[random.IntN(len(wounds))], name, tree)
}

func (r *Record) inflict(random *rand.Rand, w wound, name, tree string) error {
	r.Damaged[name] = w.what
	if err := w.inflict(random, tree); err != nil {
		return fmt.Errorf("damage layer %s: %s: %w", name, w.what, err)
	}
	return nil
}

// Harm is how much is damaged before a recording of healing.
type Harm uint8

// The kinds of harm.
const (
	// Wounds: a wound here and there, which a comparison of metadata finds.
	Wounds Harm = iota
	// Corruption: the same, but of two layers only content is changed. One of
	// them has a blob, and one has none.
	Corruption
	// Everything: snapshots/ is removed.
	Everything
)

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
// it, and notes it in the record. dirs has the trees of all layers.
func (r *Record) Hurt(p *Plan, dirs map[string]string, harm Harm) error {
	if harm == Everything {
		for name, tree := range dirs {
			r.Damaged[name] = "snapshots/ is missing"
			if err := os.RemoveAll(filepath.Dir(filepath.Dir(tree))); err != nil {
				return fmt.Errorf("damage layers: %w", err)
			}
		}
		return nil
	}
	// The top of one chain stays whole: it must not be taken for damaged.
	below := p.Chains[queried].Layers
	patients := slices.Concat(below[:len(below)-1], p.Chains[removed].Layers)
	if !p.alone() {
		patients = append(patients, p.Chains[retaken].Layers...)
	}
	random := rand.New(rand.NewPCG(p.Seed, 0xd0c))
	order := random.Perm(len(wounds))
	// Of the first that heals, it must show whether it did.
	for wounds[order[0]].ofSeal {
		order = append(order[1:], order[0])
	}
	for i, l := range append(patients, p.Hopeless()) {
		w := wounds[order[i]]
		if harm == Corruption && (l == patients[0] || l == p.Hopeless()) {
			w = corruption
			r.Corrupt = append(r.Corrupt, l.Name)
		}
		if err := r.inflict(random, w, l.Name, dirs[l.Name]); err != nil {
			return err
		}
	}
	return nil
}
