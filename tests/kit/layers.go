package kit

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Compression of a layer blob.
type Compression string

// The forms a layer takes in the registries of this world.
const (
	Plain Compression = ""
	Gzip  Compression = "gzip"
	Zstd  Compression = "zstd"
)

// layerTime is the modification time of every entry that does not set another.
// It has nanoseconds, because a time cut to seconds is a difference too.
var layerTime = time.Unix(1700000000, 123456789)

// Entry is one entry of a layer's tar. The constructors below fill in the
// header; the With methods change a copy.
type Entry struct {
	tar.Header
	body []byte           // content of a regular file, or
	file string           // the file on this machine that holds it, or
	open func() io.Reader // what makes it
}

func entry(kind byte, name string, mode int64) Entry {
	return Entry{Header: tar.Header{Typeflag: kind, Name: name, Mode: mode, ModTime: layerTime, Format: tar.FormatPAX}}
}

// Dir is a directory.
func Dir(name string, mode int64) Entry { return entry(tar.TypeDir, name+"/", mode) }

// File is a regular file.
func File(name string, mode int64, body string) Entry {
	e := entry(tar.TypeReg, name, mode)
	e.body, e.Size = []byte(body), int64(len(body))
	return e
}

// FileFrom is a regular file with the content of a file on this machine.
func FileFrom(name string, mode int64, file string) (Entry, error) {
	info, err := os.Stat(file)
	if err != nil {
		return Entry{}, fmt.Errorf("layer: %w", err)
	}
	e := entry(tar.TypeReg, name, mode)
	e.file, e.Size = file, info.Size()
	return e, nil
}

// Generated is a regular file of size bytes, which open makes when the layer is written.
func Generated(name string, mode, size int64, open func() io.Reader) Entry {
	e := entry(tar.TypeReg, name, mode)
	e.open, e.Size = open, size
	return e
}

// Symlink is a symbolic link.
func Symlink(name, target string) Entry {
	e := entry(tar.TypeSymlink, name, 0o777)
	e.Linkname = target
	return e
}

// Hardlink is another name of an entry of the same layer. It repeats the mode,
// as tar writes it: an unpacker sets the mode of both names to it.
func Hardlink(name, target string, mode int64) Entry {
	e := entry(tar.TypeLink, name, mode)
	e.Linkname = target
	return e
}

// Char, Block and Fifo are special files.
func Char(name string, mode, major, minor int64) Entry {
	e := entry(tar.TypeChar, name, mode)
	e.Devmajor, e.Devminor = major, minor
	return e
}

// Block is a block device.
func Block(name string, mode, major, minor int64) Entry {
	e := Char(name, mode, major, minor)
	e.Typeflag = tar.TypeBlock
	return e
}

// Fifo is a named pipe.
func Fifo(name string, mode int64) Entry { return entry(tar.TypeFifo, name, mode) }

// Whiteout removes name from the layers below.
func Whiteout(name string) Entry {
	return entry(tar.TypeReg, path.Join(path.Dir(name), ".wh."+path.Base(name)), 0)
}

// Opaque hides everything the layers below have in the directory.
func Opaque(dir string) Entry { return entry(tar.TypeReg, path.Join(dir, ".wh..wh..opq"), 0) }

// WithOwner gives the entry to uid:gid.
func (e Entry) WithOwner(uid, gid int) Entry { e.Uid, e.Gid = uid, gid; return e }

// WithTime sets the modification time.
func (e Entry) WithTime(t time.Time) Entry { e.ModTime = t; return e }

// WithXattr adds an extended attribute.
func (e Entry) WithXattr(name, value string) Entry {
	records := map[string]string{"SCHILY.xattr." + name: value}
	for k, v := range e.PAXRecords {
		records[k] = v
	}
	e.PAXRecords = records
	return e
}

// Layer is one layer: a sequence of entries in some compression.
type Layer struct {
	Compression Compression
	entries     func(yield func(Entry) error) error
}

// NewLayer makes a layer of the given entries, in that order.
func NewLayer(c Compression, entries ...Entry) Layer {
	return Layer{c, func(yield func(Entry) error) error {
		for _, e := range entries {
			if err := yield(e); err != nil {
				return err
			}
		}
		return nil
	}}
}

// DirLayer makes a layer of directories of this machine. The map's keys are the
// places in the image. Owners become root and times layerTime, so that the same
// content makes the same layer on every machine.
func DirLayer(c Compression, places []Place) Layer {
	return Layer{c, func(yield func(Entry) error) error {
		made := map[string]bool{".": true}
		for _, p := range places {
			if err := yieldParents(p.In, made, yield); err != nil {
				return err
			}
			if err := yieldTree(p, yield); err != nil {
				return fmt.Errorf("layer of %s: %w", p.Dir, err)
			}
		}
		return nil
	}}
}

// Place is where a directory of this machine appears in an image.
type Place struct{ Dir, In string }

func yieldParents(name string, made map[string]bool, yield func(Entry) error) error {
	dir := path.Dir(name)
	if made[dir] {
		return nil
	}
	if err := yieldParents(dir, made, yield); err != nil {
		return err
	}
	made[dir] = true
	return yield(Dir(dir, 0o755))
}

func yieldTree(p Place, yield func(Entry) error) error {
	links := map[uint64]string{}
	return filepath.WalkDir(p.Dir, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(p.Dir, file)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		name, mode := path.Join(p.In, filepath.ToSlash(rel)), int64(info.Mode().Perm())
		st := info.Sys().(*syscall.Stat_t)
		switch {
		case d.IsDir():
			return yield(Dir(name, mode))
		case d.Type() == fs.ModeSymlink:
			target, err := os.Readlink(file)
			if err != nil {
				return err
			}
			return yield(Symlink(name, target))
		case !d.Type().IsRegular():
			return fmt.Errorf("%s: type %v has no place in a layer made of a directory", file, d.Type())
		}
		if first, ok := links[st.Ino]; ok && st.Nlink > 1 {
			return yield(Hardlink(name, first, mode))
		}
		links[st.Ino] = name
		e, err := FileFrom(name, mode, file)
		if err != nil {
			return err
		}
		return yield(e)
	})
}

// write writes the layer as an uncompressed tar and notes in untimed which
// directories get the time of unpacking, see Image.Untimed.
func (l Layer) write(w io.Writer, untimed map[string]bool) error {
	tw := tar.NewWriter(w)
	var all []Entry // their headers
	err := l.entries(func(e Entry) error {
		all = append(all, Entry{Header: e.Header})
		return e.write(tw)
	})
	noteUntimed(all, untimed)
	return errors.Join(err, tw.Close())
}

// noteUntimed notes which directories get the time of unpacking from the entries
// of a layer, see Pushed.Untimed.
func noteUntimed(all []Entry, untimed map[string]bool) {
	timed := map[string]bool{}
	for _, e := range all {
		name := path.Clean("./" + path.Clean("/"+e.Name)) // a tar may have /bin, too
		if e.Typeflag == tar.TypeDir {
			timed[name] = true
		}
		for dir := path.Dir(name); ; dir = path.Dir(dir) {
			untimed[dir] = true
			if dir == "." {
				break
			}
		}
	}
	for dir := range timed {
		delete(untimed, dir)
	}
}

func (e Entry) write(tw *tar.Writer) error {
	if err := tw.WriteHeader(&e.Header); err != nil {
		return fmt.Errorf("layer entry %q: %w", e.Name, err)
	}
	var body io.Reader = bytes.NewReader(e.body)
	if e.open != nil {
		body = io.LimitReader(e.open(), e.Size)
	}
	if e.file != "" {
		f, err := os.Open(e.file)
		if err != nil {
			return fmt.Errorf("layer entry %q: %w", e.Name, err)
		}
		defer f.Close()
		body = f
	}
	if _, err := io.Copy(tw, body); err != nil {
		return fmt.Errorf("layer entry %q: %w", e.Name, err)
	}
	return nil
}

// Capability is the value of security.capability that grants exactly the
// capabilities of mask, effective and permitted: the kernel's struct
// vfs_cap_data of revision 2.
func Capability(mask uint32) string {
	le := func(v uint32) string { return string([]byte{byte(v), byte(v >> 8), byte(v >> 16), byte(v >> 24)}) }
	return le(0x02000001) + le(mask) + strings.Repeat("\x00", 12)
}
