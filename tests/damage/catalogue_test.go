package damage

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// damage is one way in which a layer can stop being whole.
type damage struct {
	name   string                             // of its directory in the layer, too
	layers []string                           // in which it makes sense
	deep   bool                               // shows in the content only
	has    func(dir string) []kit.Entry       // victims
	below  func(dir string) []kit.Entry       // what lower layers have at the same place
	do     func(at func(string) string) error // at finds a victim on disk
	finds  []kit.Finding                      // what check reports, with paths as at takes them

	// touches reports that the time of a victim is the damage itself.
	touches bool
}

// found is a finding: two empty values are those of something that is missing, or
// that should not be there.
func found(path, what, want, have string) kit.Finding {
	return kit.Finding{Path: path, What: what, Want: want, Have: have}
}

var (
	everyLayer = []string{"base", "middle", "top"}
	overOthers = []string{"middle", "top"} // where whiteouts and opaque marks hide something
)

// body is the content of every victim.
const body = "as it was built\n"

// flippedAt is the byte of a body of which one bit is flipped.
const flippedAt = 7

func sum(content string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(content))) }

// layerRoot leads a damage from its own directory to the root of the layer.
const layerRoot = "../.."

var catalogue = []damage{
	{
		name: "file-removed", layers: everyLayer, has: file("victim"),
		do:    func(at func(string) string) error { return os.Remove(at("victim")) },
		finds: []kit.Finding{found("victim", "missing", "", "")},
	},
	{
		name: "directory-removed", layers: everyLayer,
		has: func(dir string) []kit.Entry {
			return append(neighbours("victim")(dir),
				kit.Dir(dir+"/victim", 0o755), kit.File(dir+"/victim/file", 0o644, body), kit.Symlink(dir+"/victim/link", "file"))
		},
		do:    func(at func(string) string) error { return os.RemoveAll(at("victim")) },
		finds: []kit.Finding{found("victim", "missing", "", ""), found("victim/file", "missing", "", ""), found("victim/link", "missing", "", "")},
	},
	{
		name: "file-emptied", layers: everyLayer, has: file("victim"),
		do:    func(at func(string) string) error { return os.Truncate(at("victim"), 0) },
		finds: []kit.Finding{found("victim", "size", "16", "0")},
	},
	{
		name: "file-shortened", layers: everyLayer, has: file("victim"),
		do:    func(at func(string) string) error { return os.Truncate(at("victim"), 5) },
		finds: []kit.Finding{found("victim", "size", "16", "5")},
	},
	{
		name: "file-grown", layers: everyLayer, has: file("victim"),
		do:    func(at func(string) string) error { return os.Truncate(at("victim"), 1<<20) },
		finds: []kit.Finding{found("victim", "size", "16", "1048576")},
	},
	{
		name: "file-replaced", layers: everyLayer, deep: true, has: file("victim"),
		do: func(at func(string) string) error {
			other := strings.ToUpper(body)
			return errors.Join(os.WriteFile(at("other"), []byte(other), 0o644), os.Rename(at("other"), at("victim")))
		},
		finds: []kit.Finding{found("victim", "sha256digest", sum(body), sum(strings.ToUpper(body)))},
	},
	{
		name: "bit-flipped", layers: everyLayer, deep: true, has: file("victim"),
		do: func(at func(string) string) error {
			f, err := os.OpenFile(at("victim"), os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			_, err = f.WriteAt([]byte{body[flippedAt] ^ 1}, flippedAt)
			return errors.Join(err, f.Close())
		},
		finds: []kit.Finding{found("victim", "sha256digest", sum(body), sum(body[:flippedAt]+string(body[flippedAt]^1)+body[flippedAt+1:]))},
	},
	{
		name: "mode", layers: everyLayer, has: file("victim"),
		do:    func(at func(string) string) error { return os.Chmod(at("victim"), 0o600) },
		finds: []kit.Finding{found("victim", "mode", "0644", "0600")},
	},
	{
		name: "owner", layers: everyLayer, has: file("victim"),
		do:    func(at func(string) string) error { return os.Lchown(at("victim"), 54321, 12345) },
		finds: []kit.Finding{found("victim", "uid", "0", "54321"), found("victim", "gid", "0", "12345")},
	},
	{
		name: "setuid", layers: everyLayer,
		has:   func(dir string) []kit.Entry { return []kit.Entry{kit.File(dir+"/victim", 0o4755, body)} },
		do:    func(at func(string) string) error { return os.Chmod(at("victim"), 0o755) },
		finds: []kit.Finding{found("victim", "mode", "04755", "0755")},
	},
	{
		name: "directory-mode", layers: everyLayer,
		has:   func(dir string) []kit.Entry { return []kit.Entry{kit.Dir(dir+"/victim", 0o1777)} },
		do:    func(at func(string) string) error { return os.Chmod(at("victim"), 0o777) },
		finds: []kit.Finding{found("victim", "mode", "01777", "0777")},
	},
	{
		name: "root-mode", layers: everyLayer,
		do:    func(at func(string) string) error { return os.Chmod(at(layerRoot), 0o750) },
		finds: []kit.Finding{found(layerRoot, "mode", "0755", "0750")},
	},
	{
		name: "time", layers: everyLayer, has: file("victim"), touches: true,
		do:    func(at func(string) string) error { return os.Chtimes(at("victim"), time.Time{}, time.Unix(5, 0)) },
		finds: []kit.Finding{found("victim", "time", "1700000000.123456789", "5.000000000")},
	},
	{
		name: "capability-changed", layers: everyLayer, has: attributed("victim", capability, kit.Capability(1)),
		do: func(at func(string) string) error {
			return unix.Lsetxattr(at("victim"), capability, []byte(kit.Capability(3)), 0)
		},
		finds: []kit.Finding{found("victim", "xattr."+capability, strconv.Quote(kit.Capability(1)), strconv.Quote(kit.Capability(3)))},
	},
	{
		name: "capability-dropped", layers: everyLayer, has: attributed("victim", capability, kit.Capability(1)),
		do:    func(at func(string) string) error { return unix.Lremovexattr(at("victim"), capability) },
		finds: []kit.Finding{found("victim", "xattr."+capability, strconv.Quote(kit.Capability(1)), "")},
	},
	{
		name: "attribute-changed", layers: everyLayer, has: attributed("victim", "user.kept", "yes"),
		do:    func(at func(string) string) error { return unix.Lsetxattr(at("victim"), "user.kept", []byte("no"), 0) },
		finds: []kit.Finding{found("victim", "xattr.user.kept", `"yes"`, `"no"`)},
	},
	{
		name: "capability-added", layers: everyLayer, has: file("victim"),
		do: func(at func(string) string) error {
			return unix.Lsetxattr(at("victim"), capability, []byte(kit.Capability(1)), 0)
		},
		finds: []kit.Finding{found("victim", "xattr."+capability, "", strconv.Quote(kit.Capability(1)))},
	},
	{
		name: "opaque-changed", layers: overOthers, has: opaque("victim"), below: within("victim"),
		do:    func(at func(string) string) error { return unix.Lsetxattr(at("victim"), opaqueMark, []byte("n"), 0) },
		finds: []kit.Finding{found("victim", "xattr."+opaqueMark, `"y"`, `"n"`)},
	},
	{
		name: "opaque-dropped", layers: overOthers, has: opaque("victim"), below: within("victim"),
		do:    func(at func(string) string) error { return unix.Lremovexattr(at("victim"), opaqueMark) },
		finds: []kit.Finding{found("victim", "xattr."+opaqueMark, `"y"`, "")},
	},
	{
		name: "opaque-added", layers: overOthers, has: within("victim"), below: within("victim"),
		do:    func(at func(string) string) error { return unix.Lsetxattr(at("victim"), opaqueMark, []byte("y"), 0) },
		finds: []kit.Finding{found("victim", "xattr."+opaqueMark, "", `"y"`)},
	},
	{
		name: "whiteout-removed", layers: overOthers, has: whiteout("victim"), below: file("victim"),
		do:    func(at func(string) string) error { return os.Remove(at("victim")) },
		finds: []kit.Finding{found("victim", "missing", "", "")},
	},
	{
		name: "whiteout-filled", layers: overOthers, has: whiteout("victim"), below: file("victim"),
		do: func(at func(string) string) error {
			return errors.Join(os.Remove(at("victim")), os.WriteFile(at("victim"), []byte(body), 0o644))
		},
		finds: []kit.Finding{found("victim", "type", "char", "file")},
	},
	{
		name: "whiteout-added", layers: overOthers, has: nothing, below: file("victim"),
		do: func(at func(string) string) error {
			return unix.Mknod(at("victim"), unix.S_IFCHR, int(unix.Mkdev(0, 0)))
		},
		finds: []kit.Finding{found("victim", "extra", "", "")},
	},
	{
		name: "symlink-retargeted", layers: everyLayer,
		has: func(dir string) []kit.Entry { return []kit.Entry{kit.Symlink(dir+"/victim", "here")} },
		do: func(at func(string) string) error {
			return errors.Join(os.Remove(at("victim")), os.Symlink("hole", at("victim")))
		},
		finds: []kit.Finding{found("victim", "link", "here", "hole")},
	},
	{
		name: "file-added", layers: everyLayer, has: nothing,
		do:    func(at func(string) string) error { return os.WriteFile(at("new"), []byte(body), 0o644) },
		finds: []kit.Finding{found("new", "extra", "", "")},
	},
	{
		name: "directory-added", layers: everyLayer, has: neighbours("new"),
		do: func(at func(string) string) error {
			return errors.Join(os.Mkdir(at("new"), 0o755), os.Symlink("x", at("new/link")))
		},
		finds: []kit.Finding{found("new", "extra", "", ""), found("new/link", "extra", "", "")},
	},
	{
		name: "hardlink-added", layers: everyLayer, has: file("victim"),
		do:    func(at func(string) string) error { return os.Link(at("victim"), at("wictim")) },
		finds: []kit.Finding{found("wictim", "extra", "", "")},
	},
	{
		name: "type", layers: everyLayer, has: file("victim"),
		do: func(at func(string) string) error {
			return errors.Join(os.Remove(at("victim")), os.Mkdir(at("victim"), 0o755))
		},
		finds: []kit.Finding{found("victim", "type", "file", "dir")},
	},
	{
		name: "device", layers: everyLayer,
		has: func(dir string) []kit.Entry { return []kit.Entry{kit.Char(dir+"/victim", 0o666, 1, 3)} },
		do: func(at func(string) string) error {
			return errors.Join(os.Remove(at("victim")), unix.Mknod(at("victim"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))), os.Chmod(at("victim"), 0o666))
		},
		finds: []kit.Finding{found("victim", "device", "native,1,3", "native,1,5")},
	},
}

const (
	capability = "security.capability"
	opaqueMark = "trusted.overlay.opaque"
)

// Victims of common kinds, in the directory of a damage.

func file(name string) func(dir string) []kit.Entry {
	return func(dir string) []kit.Entry { return []kit.Entry{kit.File(dir+"/"+name, 0o644, body)} }
}

func attributed(name, attr, value string) func(dir string) []kit.Entry {
	return func(dir string) []kit.Entry {
		return []kit.Entry{kit.File(dir+"/"+name, 0o755, body).WithXattr(attr, value)}
	}
}

// within is a directory with a file.
func within(name string) func(dir string) []kit.Entry {
	return func(dir string) []kit.Entry {
		return append([]kit.Entry{kit.Dir(dir+"/"+name, 0o755)}, file("file")(dir+"/"+name)...)
	}
}

// neighbours sort before and after what is in the directory name, which a
// comparison of whole paths mixes up.
func neighbours(name string) func(dir string) []kit.Entry {
	return func(dir string) []kit.Entry {
		var all []kit.Entry
		for _, suffix := range []string{" ", "-", ".d", "0"} {
			all = append(all, file(name+suffix)(dir)...)
		}
		return all
	}
}

func opaque(name string) func(dir string) []kit.Entry {
	return func(dir string) []kit.Entry {
		return []kit.Entry{kit.Dir(dir+"/"+name, 0o755), kit.Opaque(dir + "/" + name)}
	}
}

func whiteout(name string) func(dir string) []kit.Entry {
	return func(dir string) []kit.Entry { return []kit.Entry{kit.Whiteout(dir + "/" + name)} }
}

func nothing(string) []kit.Entry { return nil }

// inflict does the damage to a layer whose tree is below root, in the directory
// dir of that tree, and puts all times back.
func (d *damage) inflict(root, dir string) error {
	own := filepath.Join(root, dir)
	times, err := timesBelow(own)
	if err != nil {
		return err
	}
	if err := d.do(func(name string) string { return filepath.Join(own, name) }); err != nil {
		return fmt.Errorf("%s in %s: %w", d.name, own, err)
	}
	if d.touches {
		return nil
	}
	for path, mtime := range times {
		err := unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{{Nsec: unix.UTIME_OMIT}, mtime}, unix.AT_SYMLINK_NOFOLLOW)
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return &os.PathError{Op: "utimensat", Path: path, Err: err}
		}
	}
	return nil
}

func timesBelow(dir string) (map[string]unix.Timespec, error) {
	times := map[string]unix.Timespec{}
	return times, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		times[path] = unix.Timespec(info.Sys().(*syscall.Stat_t).Mtim)
		return nil
	})
}

// expected is what check finds of the damage in the directory dir of a layer.
func (d *damage) expected(dir string) []kit.Finding {
	var all []kit.Finding
	for _, f := range d.finds {
		f.Path = filepath.Join(dir, f.Path)
		all = append(all, f)
	}
	return all
}
