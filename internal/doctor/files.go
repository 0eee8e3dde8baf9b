package doctor

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// table is a table of TOML.
type table map[string]any

// at returns the table at a path, nil when there is none.
func (t table) at(path ...string) table {
	for _, name := range path {
		next, _ := t[name].(map[string]any)
		t = next
	}
	return t
}

func (t table) text(key string) string { s, _ := t[key].(string); return s }

func (t table) truth(key string) bool { b, _ := t[key].(bool); return b }

func (t table) texts(key string) (all []string) {
	list, _ := t[key].([]any)
	for _, v := range list {
		if s, ok := v.(string); ok {
			all = append(all, s)
		}
	}
	return all
}

// tables returns the tables of an array of tables.
func (t table) tables(key string) (all []table) {
	list, _ := t[key].([]any)
	for _, v := range list {
		if m, ok := v.(map[string]any); ok {
			all = append(all, m)
		}
	}
	return all
}

func (t table) version() int64 { v, _ := t["version"].(int64); return v }

// File is one file of containerd's configuration.
type File struct {
	Path     string
	Imported bool // or the main file
	Err      error
	Has      table
}

// Files are containerd's configuration as the next start will read it.
type Files struct {
	All  []File // the main file first, then what it imports, then drop-ins that it does not import
	Dump table  // what containerd itself makes of them, nil when it was not determined
	// Broken is why containerd refuses the files. Err is why they could not be tried.
	Broken, Err error
}

const defaultFile = "/etc/containerd/config.toml"

// dropIns are where a node has drop-ins, beside the main file: a distribution, k3s and RKE2.
var dropIns = []string{"conf.d/*.toml", "config-v3.toml.d/*.toml", "config.toml.d/*.toml"}

// files reads the configuration of the containerd with a process ID, or of that in PATH if none
// runs, and lets its program print what it makes of it.
func files(ctx context.Context, main string, pid int) (f Files) {
	program, name := procPath(pid, "exe"), "containerd"
	if pid > 0 {
		line, _ := os.ReadFile(procPath(pid, "cmdline"))
		args := strings.Split(string(line), "\x00")
		// Some programs are containerd only by their name.
		name = cmp.Or(args[0], name)
		main = cmp.Or(main, configFlag(args))
	} else if program, f.Err = exec.LookPath("containerd"); f.Err != nil {
		f.Err = errors.New("containerd does not run, and is not in PATH")
	}
	main = cmp.Or(main, defaultFile)
	f.All = read(main)
	if f.Err != nil {
		return f
	}
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, program, "--config", main, "config", "dump")
	cmd.Args[0], cmd.Stderr = name, &stderr
	out, err := cmd.Output()
	exit := (*exec.ExitError)(nil)
	switch {
	case errors.As(err, &exit) && exit.Exited():
		f.Broken = fmt.Errorf("containerd --config %s config dump: %s", main, lastLine(stderr.String()))
	case err != nil:
		f.Err = fmt.Errorf("containerd config dump: %w", err)
	default:
		if err := toml.Unmarshal(out, &f.Dump); err != nil {
			f.Err = fmt.Errorf("what containerd config dump prints: %w", err)
		}
	}
	return f
}

// configFlag is the value of containerd's flag --config.
func configFlag(args []string) string {
	for i, a := range args {
		a = strings.TrimPrefix(a, "-")
		for _, flag := range []string{"-config", "-c", "config", "c"} {
			if a == flag && i+1 < len(args) {
				return args[i+1]
			}
			if v, ok := strings.CutPrefix(a, flag+"="); ok {
				return v
			}
		}
	}
	return ""
}

// lastLine is the message of a program that prints a usage or a log before it.
func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.TrimSpace(lines[len(lines)-1])
}

// read reads a main file, its imports as containerd finds them, and the drop-ins that are not imported.
func read(main string) (all []File) {
	known := map[string]bool{}
	var visit func(path string)
	visit = func(path string) {
		if known[path] {
			return
		}
		known[path] = true
		f := File{Path: path, Imported: true}
		text, err := os.ReadFile(path)
		if f.Err = err; err == nil {
			f.Err = toml.Unmarshal(text, &f.Has)
		}
		all = append(all, f)
		for _, pattern := range f.Has.texts("imports") {
			if !filepath.IsAbs(pattern) {
				pattern = filepath.Join(filepath.Dir(path), pattern)
			}
			matches, _ := filepath.Glob(pattern)
			for _, m := range matches {
				visit(filepath.Clean(m))
			}
		}
	}
	visit(filepath.Clean(main))
	var ignored []string
	for _, pattern := range dropIns {
		matches, _ := filepath.Glob(filepath.Join(filepath.Dir(main), pattern))
		ignored = append(ignored, matches...)
	}
	for _, path := range ignored {
		if !known[path] {
			f := File{Path: path}
			text, err := os.ReadFile(path)
			if f.Err = err; err == nil {
				f.Err = toml.Unmarshal(text, &f.Has)
			}
			all = append(all, f)
		}
	}
	return all
}

// main is the main file.
func (f Files) main() File {
	if len(f.All) == 0 {
		return File{Path: defaultFile, Err: os.ErrNotExist}
	}
	return f.All[0]
}

// The plugins of containerd that configure images, by the version of the file.
const (
	criPlugin      = "io.containerd.grpc.v1.cri"
	imagesPlugin   = "io.containerd.cri.v1.images"
	runtimePlugin  = "io.containerd.cri.v1.runtime"
	transferPlugin = "io.containerd.transfer.v1.local"
	diffService    = "io.containerd.service.v1.diff-service"
)

// images is the table with the keys of images: that of 2.x, or that of 1.x.
func (f Files) images() table {
	p := f.Dump.at("plugins")
	if t := p.at(imagesPlugin); t != nil {
		return t
	}
	return p.at(criPlugin, "containerd")
}

// proxies are the names of the proxy plugins at a socket, as the next start will have them.
func (f Files) proxies(address string) (names []string) {
	for name := range f.Dump.at("proxy_plugins") {
		p := f.Dump.at("proxy_plugins", name)
		if p.text("type") == "snapshot" && samePath(strings.TrimPrefix(p.text("address"), "unix://"), address) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

func samePath(a, b string) bool {
	if filepath.Clean(a) == filepath.Clean(b) {
		return true
	}
	x, err := os.Stat(a)
	if err != nil {
		return false
	}
	y, err := os.Stat(b)
	return err == nil && os.SameFile(x, y)
}

func procPath(pid int, name string) string { return filepath.Join("/proc", strconv.Itoa(pid), name) }

func number(text string) int64 {
	n, _ := strconv.ParseInt(text, 10, 64)
	return n
}

// diskAt finds the disk of a device number below a directory like /sys/dev/block. The queue of a
// partition is that of the disk that it is on.
func diskAt(dir string, major, minor uint32) (d Disk) {
	path, err := filepath.EvalSymlinks(filepath.Join(dir, fmt.Sprintf("%d:%d", major, minor)))
	if err != nil {
		return d
	}
	if _, err := os.Stat(filepath.Join(path, "partition")); err == nil {
		path = filepath.Dir(path)
	}
	d.Name = filepath.Base(path)
	cache, _ := os.ReadFile(filepath.Join(path, "queue", "write_cache"))
	d.Cache = strings.TrimSpace(string(cache))
	removable, _ := os.ReadFile(filepath.Join(path, "removable"))
	d.Removable = strings.TrimSpace(string(removable)) == "1"
	return d
}
