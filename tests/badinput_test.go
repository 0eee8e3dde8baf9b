package tests

import (
	"bytes"
	"crypto/rand"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// TestRefusesToStart starts the daemon in situations in which it must not serve.
// It has to say why, within seconds, and change nothing.
func TestRefusesToStart(t *testing.T) {
	disk := newDisk(t, kit.DiskOptions{})
	for _, c := range []struct {
		name   string
		config string
		flags  []string                          // after the usual ones, which they override
		set    func(t *testing.T, d *kit.Daemon) // changes root or address
		says   []string
	}{
		{name: "unknown key", config: "log_level = 'info'\n\n[snapshotter]\nsync_removed = true\n", says: []string{"config.toml:4", "sync_removed"}},
		{name: "unknown table", config: "[nonsense]\nkey = 1\n", says: []string{"config.toml:1", "nonsense"}},
		{name: "not TOML", config: "root = '/x'\nthis is not TOML\n", says: []string{"config.toml:2"}},
		{name: "value of the wrong type", config: "[snapshotter]\nsync_remove = 'yes'\n", says: []string{"config.toml:2"}},
		{name: "unknown log level", flags: []string{"--log-level", "loud"}, says: []string{"log_level", "loud"}},
		{name: "relative root", set: func(_ *testing.T, d *kit.Daemon) { d.Root = "relative/root" }, says: []string{`"relative/root"`, "absolute"}},
		{name: "relative address", set: func(_ *testing.T, d *kit.Daemon) { d.Address = "durable.sock" }, says: []string{`"durable.sock"`, "absolute"}},
		{name: "root is a file", set: rootIsFile, says: []string{"not a directory"}},
		{name: "root below a file", set: func(t *testing.T, d *kit.Daemon) { rootIsFile(t, d); d.Root += "/below" }, says: []string{"not a directory"}},
		{name: "root in a read-only file system", set: rootReadOnly, says: []string{"read-only"}},
		{name: "existing root in a read-only file system", set: rootExistsReadOnly, says: []string{"read-only"}},
		{name: "root on tmpfs", set: rootOnTmpfs, says: []string{"tmpfs"}},
		{name: "root on overlay", set: rootOnOverlay, says: []string{"overlay"}},
		{name: "root on FUSE", set: rootOnFUSE, says: []string{"FUSE"}},
		{name: "root without d_type", set: rootWithoutDType, says: []string{"d_type"}},
		{name: "root with a colon", set: func(_ *testing.T, d *kit.Daemon) { d.Root += ":1" }, says: []string{`: , \`}},
		{name: "socket path too long", set: func(_ *testing.T, d *kit.Daemon) {
			d.Address = filepath.Join(filepath.Dir(d.Address), strings.Repeat("s", 120))
		}, says: []string{"socket path", "107"}},
		{name: "a file where the socket should be", set: func(t *testing.T, d *kit.Daemon) { writeFile(t, d.Address, "not a socket") }, says: []string{"not a socket"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, err := kit.NewDaemon(kit.DaemonOptions{
				Binary: shared.bins.Daemon, Config: c.config,
				Dir: disk.Path(strings.ReplaceAll(c.name, " ", "-")), RunDir: shortDir(t),
			})
			if err != nil {
				t.Fatal(err)
			}
			if c.set != nil {
				c.set(t, d)
			}
			refuses(t, d, c.flags, c.says...)
		})
	}
}

// refuses launches the daemon and expects it to end by itself with a reason.
func refuses(t *testing.T, d *kit.Daemon, flags []string, says ...string) {
	t.Helper()
	log := filepath.Join(filepath.Dir(d.LogPath()), "refused.log")
	p, err := kit.StartProcess("durable-snapshotter", log, nil, append(d.Argv(), flags...)...)
	if err != nil {
		t.Fatal(err)
	}
	code, err := p.Wait(10 * time.Second)
	if err != nil {
		if kerr := p.Kill(); kerr != nil {
			t.Error(kerr)
		}
		t.Fatal(err)
	}
	text, err := p.Log()
	if err != nil {
		t.Fatal(err)
	}
	if code != 1 {
		t.Errorf("exit status %d, want 1:\n%s", code, text)
	}
	for _, say := range says {
		if !strings.Contains(text, say) {
			t.Errorf("it does not say %q:\n%s", say, text)
		}
	}
	wantNoPanic(t, text)
}

func wantNoPanic(t *testing.T, log string) {
	t.Helper()
	for _, word := range []string{"panic", "goroutine "} {
		if strings.Contains(log, word) {
			t.Errorf("the log speaks of a %s:\n%s", word, log)
		}
	}
}

func rootIsFile(t *testing.T, d *kit.Daemon) {
	t.Helper()
	writeFile(t, d.Root, "a file")
}

func rootReadOnly(t *testing.T, d *kit.Daemon) {
	t.Helper()
	disk := newDisk(t, kit.DiskOptions{Size: 256 << 20})
	remountReadOnly(t, disk)
	d.Root = disk.Path("root")
}

func rootExistsReadOnly(t *testing.T, d *kit.Daemon) {
	t.Helper()
	disk := newDisk(t, kit.DiskOptions{Size: 256 << 20})
	d.Root = disk.Path("root")
	if err := os.Mkdir(d.Root, 0o700); err != nil {
		t.Fatal(err)
	}
	remountReadOnly(t, disk)
}

func remountReadOnly(t *testing.T, disk *kit.Disk) {
	t.Helper()
	if err := disk.Unmount(); err != nil {
		t.Fatal(err)
	}
	if err := disk.MountWith("ro"); err != nil {
		t.Fatal(err)
	}
}

func rootOnTmpfs(t *testing.T, d *kit.Daemon) {
	t.Helper()
	d.Root = mounted(t, "tmpfs", "")
}

func rootOnOverlay(t *testing.T, d *kit.Daemon) {
	t.Helper()
	disk := newDisk(t, kit.DiskOptions{Size: 256 << 20})
	for _, dir := range []string{"lower", "upper", "work"} {
		if err := os.Mkdir(disk.Path(dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	d.Root = mounted(t, "overlay", "lowerdir="+disk.Path("lower")+",upperdir="+disk.Path("upper")+",workdir="+disk.Path("work"))
}

// mounted mounts a file system on a fresh directory for the length of the test.
func mounted(t *testing.T, kind, options string) string {
	t.Helper()
	dir := shortDir(t)
	if err := unix.Mount(kind, dir, kind, 0, options); err != nil {
		t.Fatalf("mount %s: %v", kind, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// rootOnFUSE passes a directory of a good ext4 through a FUSE server.
func rootOnFUSE(t *testing.T, d *kit.Daemon) {
	t.Helper()
	disk := newDisk(t, kit.DiskOptions{Size: 256 << 20})
	root, err := fs.NewLoopbackRoot(disk.Path())
	if err != nil {
		t.Fatal(err)
	}
	d.Root = shortDir(t)
	server, err := fs.Mount(d.Root, root, &fs.Options{MountOptions: fuse.MountOptions{DirectMountStrict: true, FsName: "loopback"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Unmount(); err != nil {
			t.Error(err)
		}
	})
}

// rootWithoutDType uses an ext4 whose directories do not hold the types of
// their entries, which overlayfs needs.
func rootWithoutDType(t *testing.T, d *kit.Daemon) {
	t.Helper()
	d.Root = newDisk(t, kit.DiskOptions{Size: 256 << 20, Mkfs: []string{"-O", "^filetype"}}).Path("root")
}

// TestRefusesWithoutRoot runs the daemon as the nobody of a user namespace.
func TestRefusesWithoutRoot(t *testing.T) {
	disk := newDisk(t, kit.DiskOptions{})
	d, err := kit.NewDaemon(kit.DaemonOptions{
		Binary: shared.bins.Daemon, Dir: disk.Path("d"), RunDir: shortDir(t), Wrapper: []string{"unshare", "--user"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("unshare", "--user", "id", "-u").CombinedOutput(); err != nil || string(out) == "0\n" {
		t.Fatalf("unshare --user id: %s %v", out, err)
	}
	if err := os.Mkdir(d.Root, 0o777); err != nil {
		t.Fatal(err)
	}
	refuses(t, d, nil, "root")
}

// TestGarbageDatabase puts something else where metadata.db was. The daemon must
// say which file and what to do, and leave the file as it is.
func TestGarbageDatabase(t *testing.T) {
	disk := newDisk(t, kit.DiskOptions{})
	for name, spoil := range map[string]func(whole []byte) []byte{
		"text":             func([]byte) []byte { return []byte("this is not a database\n") },
		"noise":            func(b []byte) []byte { rand.Read(b); return b },
		"zeros":            func(b []byte) []byte { return make([]byte, len(b)) },
		"empty":            func([]byte) []byte { return nil },
		"cut in half":      func(b []byte) []byte { return b[:len(bytes.TrimRight(b, "\x00"))/2] }, // the rest is room to grow
		"less than a page": func(b []byte) []byte { return b[:1000] },
		"meta pages gone":  func(b []byte) []byte { clear(b[:2*os.Getpagesize()]); return b },
	} {
		t.Run(name, func(t *testing.T) {
			d := startDaemon(t, kit.DaemonOptions{Dir: disk.Path(strings.ReplaceAll(name, " ", "-")), RunDir: shortDir(t)})
			makeLayer(t, d, "layer")
			if err := d.Stop(); err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(d.Root, "metadata.db")
			whole, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			bad := spoil(whole)
			if err := os.WriteFile(file, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			before := fingerprint(t, d.Root)
			refuses(t, d, nil, file, "repair --rebuild")
			if after, err := os.ReadFile(file); err != nil || !bytes.Equal(after, bad) {
				t.Errorf("metadata.db was changed (%v)", err)
			}
			after := fingerprint(t, d.Root)
			// A probe of the file system comes and goes before the file is read.
			before.Untime(".")
			after.Untime(".")
			if diff := kit.Diff(before, after, 10); diff != "" {
				t.Errorf("the root was changed:\n%s", diff)
			}
		})
	}
}

// TestSecondDaemon starts another daemon on what a first one is using.
func TestSecondDaemon(t *testing.T) {
	disk := newDisk(t, kit.DiskOptions{})
	first := startDaemon(t, kit.DaemonOptions{Dir: disk.Path("first"), RunDir: shortDir(t)})
	makeLayer(t, first, "layer")
	for _, c := range []struct {
		name string
		set  func(second *kit.Daemon)
		says string
	}{
		{"same root", func(second *kit.Daemon) { second.Root = first.Root }, "in use by another durable-snapshotter"},
		{"same socket", func(second *kit.Daemon) { second.Address = first.Address }, "another daemon answers"},
		{"both", func(second *kit.Daemon) { second.Root, second.Address = first.Root, first.Address }, "another"},
	} {
		t.Run(c.name, func(t *testing.T) {
			second, err := kit.NewDaemon(kit.DaemonOptions{Binary: shared.bins.Daemon, Dir: disk.Path("second"), RunDir: shortDir(t)})
			if err != nil {
				t.Fatal(err)
			}
			c.set(second)
			refuses(t, second, nil, c.says)
			if err := first.Healthy(t.Context()); err != nil {
				t.Errorf("the first daemon suffered: %v", err)
			}
			wantCommitted(t, first, "layer")
		})
	}
}

// TestStaleSocket leaves sockets behind that nobody listens on.
func TestStaleSocket(t *testing.T) {
	disk := newDisk(t, kit.DiskOptions{})
	d, err := kit.NewDaemon(kit.DaemonOptions{Binary: shared.bins.Daemon, Dir: disk.Path("d"), RunDir: shortDir(t)})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: d.Address, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := d.Start(t.Context()); err != nil {
		t.Fatalf("with a stale socket: %v", err)
	}
	if err := d.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := d.Start(t.Context()); err != nil {
		t.Fatalf("with the socket of a killed daemon: %v", err)
	}
	info, err := os.Stat(d.Address)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v, want mode 0600", info, err)
	}
	if err := d.Stop(); err != nil {
		t.Error(err)
	}
}

// TestSocketDirectory has the daemon make the directory of its socket.
func TestSocketDirectory(t *testing.T) {
	disk := newDisk(t, kit.DiskOptions{})
	d, err := kit.NewDaemon(kit.DaemonOptions{Binary: shared.bins.Daemon, Dir: disk.Path("d"), RunDir: shortDir(t)})
	if err != nil {
		t.Fatal(err)
	}
	d.Address = filepath.Join(filepath.Dir(d.Address), "new", "durable.sock")
	if err := d.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(filepath.Dir(d.Address))
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("directory of the socket: %v, %v, want mode 0700", info, err)
	}
	if err := d.Stop(); err != nil {
		t.Error(err)
	}
}

func writeFile(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func fingerprint(t *testing.T, dir string, skip ...string) kit.Tree {
	t.Helper()
	tree, err := kit.Fingerprint(dir, skip...)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}
