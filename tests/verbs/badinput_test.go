package verbs

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestRefusesToStart starts the daemon in situations in which it must not serve.
// It has to print why, within seconds, and change nothing.
func TestRefusesToStart(t *testing.T) {
	disk := newDisk(t, kit.DiskOptions{})
	for _, c := range []struct {
		name   string
		config string
		flags  []string                          // after the usual ones, which they override
		set    func(t *testing.T, d *kit.Daemon) // changes root or address
		wants  []string
	}{
		{name: "unknown key", config: "log_level = 'info'\n\n[snapshotter]\nsync_removed = true\n", wants: []string{"config.toml:4", "sync_removed"}},
		{name: "unknown table", config: "[nonsense]\nkey = 1\n", wants: []string{"config.toml:1", "nonsense"}},
		{name: "not TOML", config: "root = '/x'\nthis is not TOML\n", wants: []string{"config.toml:2"}},
		{name: "value of the wrong type", config: "[snapshotter]\nsync_remove = 'yes'\n", wants: []string{"config.toml:2"}},
		{name: "unknown log level", flags: []string{"--log-level", "loud"}, wants: []string{"log_level", "loud"}},
		{name: "relative root", set: func(_ *testing.T, d *kit.Daemon) { d.Root = "relative/root" }, wants: []string{`"relative/root"`, "absolute"}},
		{name: "relative address", set: func(_ *testing.T, d *kit.Daemon) { d.Address = "durable.sock" }, wants: []string{`"durable.sock"`, "absolute"}},
		{name: "root is a file", set: rootIsFile, wants: []string{"not a directory"}},
		{name: "root below a file", set: func(t *testing.T, d *kit.Daemon) { rootIsFile(t, d); d.Root += "/below" }, wants: []string{"not a directory"}},
		{name: "root in a read-only file system", set: rootReadOnly, wants: []string{"read-only"}},
		{name: "existing root in a read-only file system", set: rootExistsReadOnly, wants: []string{"read-only"}},
		{name: "root on tmpfs", set: rootOnTmpfs, wants: []string{"tmpfs"}},
		{name: "root on overlay", set: rootOnOverlay, wants: []string{"overlay"}},
		{name: "root on FUSE", set: rootOnFUSE, wants: []string{"FUSE"}},
		{name: "root without d_type", set: rootWithoutDType, wants: []string{"d_type"}},
		{name: "root with a colon", set: func(_ *testing.T, d *kit.Daemon) { d.Root += ":1" }, wants: []string{`: , \`}},
		{name: "socket path too long", set: func(_ *testing.T, d *kit.Daemon) {
			d.Address = filepath.Join(filepath.Dir(d.Address), strings.Repeat("s", 120))
		}, wants: []string{"socket path", "107"}},
		{name: "a file where the socket should be", set: func(t *testing.T, d *kit.Daemon) { writeFile(t, d.Address, "not a socket") }, wants: []string{"not a socket"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, err := kit.NewDaemon(kit.DaemonOptions{
				Binary: kittest.Binaries(t).Daemon, Config: c.config,
				Dir: disk.Path(strings.ReplaceAll(c.name, " ", "-")), RunDir: scratch(t),
			})
			if err != nil {
				t.Fatal(err)
			}
			if c.set != nil {
				c.set(t, d)
			}
			refuses(t, d, c.flags, c.wants...)
		})
	}
}

// refuses launches the daemon and expects it to end by itself with a reason.
func refuses(t *testing.T, d *kit.Daemon, flags []string, wants ...string) {
	t.Helper()
	log := filepath.Join(filepath.Dir(d.LogPath()), "refused.log")
	p, err := kit.StartProcess("durable-snapshotter", log, nil, append(d.Argv(), flags...)...)
	if err != nil {
		t.Fatal(err)
	}
	code, err := p.Wait(time.Minute)
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
	for _, want := range wants {
		if !strings.Contains(text, want) {
			t.Errorf("the output does not contain %q:\n%s", want, text)
		}
	}
	kittest.NoPanic(t, text)
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
	dir := scratch(t)
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
	d.Root = scratch(t)
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

// TestRefusesWithoutRoot runs the daemon as an unprivileged user of a user namespace.
func TestRefusesWithoutRoot(t *testing.T) {
	disk := newDisk(t, kit.DiskOptions{})
	d, err := kit.NewDaemon(kit.DaemonOptions{
		Binary: kittest.Binaries(t).Daemon, Dir: disk.Path("d"), RunDir: scratch(t), Wrapper: []string{"unshare", "--user"},
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
// print which file and what to do, and leave the file as it is.
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
			d := kittest.StartDaemon(t, kit.DaemonOptions{Dir: disk.Path(strings.ReplaceAll(name, " ", "-")), RunDir: scratch(t)})
			kittest.MakeLayer(t, d, "layer")
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
	first := kittest.StartDaemon(t, kit.DaemonOptions{Dir: disk.Path("first"), RunDir: scratch(t)})
	kittest.MakeLayer(t, first, "layer")
	for _, c := range []struct {
		name  string
		set   func(second *kit.Daemon)
		wants string
	}{
		{"same root", func(second *kit.Daemon) { second.Root = first.Root }, "in use by another durable-snapshotter"},
		{"same socket", func(second *kit.Daemon) { second.Address = first.Address }, "another daemon answers"},
		{"both", func(second *kit.Daemon) { second.Root, second.Address = first.Root, first.Address }, "another"},
	} {
		t.Run(c.name, func(t *testing.T) {
			second, err := kit.NewDaemon(kit.DaemonOptions{Binary: kittest.Binaries(t).Daemon, Dir: disk.Path("second"), RunDir: scratch(t)})
			if err != nil {
				t.Fatal(err)
			}
			c.set(second)
			refuses(t, second, nil, c.wants)
			if err := first.Healthy(t.Context()); err != nil {
				t.Errorf("the first daemon suffered: %v", err)
			}
			wantCommitted(t, first, "layer")
		})
	}
}

// TestServeWaitsForRepair starts the daemon while a verb has its root, as systemd does
// after a crash while an operator already types repair. The verb is stopped in the
// middle, for longer than a daemon waits for another one.
func TestServeWaitsForRepair(t *testing.T) {
	disk := newDisk(t, kit.DiskOptions{})
	d := kittest.StartDaemon(t, kit.DaemonOptions{Dir: disk.Path("d"), RunDir: scratch(t)})
	kittest.MakeLayer(t, d, "layer")
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(d.Stop())
	root, err := os.Open(d.Root)
	check(err)
	defer root.Close()
	free := func() bool {
		err := unix.Flock(int(root.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		return err == nil && unix.Flock(int(root.Fd()), unix.LOCK_UN) == nil
	}
	verb := []string{kittest.Binaries(t).Daemon, "repair", "--deep", "--apply", "--root", d.Root, "--address", d.Address}
	waited := false
	for pause := time.Duration(0); !waited && pause < time.Second; pause += time.Millisecond / 2 {
		file := filepath.Join(t.TempDir(), "repair.log")
		p, err := kit.StartProcess("repair", file, nil, verb...)
		check(err)
		time.Sleep(pause) // until it has the lock and has not ended
		err = p.While(func() error {
			if free() {
				return nil
			}
			check(d.Launch())
			kittest.WaitFor(t, time.Minute, func() error {
				if log, err := d.Log(); err != nil || !strings.Contains(log, "the start goes on when it has ended") {
					return fmt.Errorf("the daemon does not log that it waits: %w", err)
				}
				return nil
			})
			time.Sleep(5 * time.Second) // a daemon gives up after 4 s beside another one
			if waited = d.Running(); !waited {
				t.Error("the daemon did not wait")
			}
			return nil
		})
		code, werr := p.Wait(time.Minute)
		if waited && (err != nil || werr != nil || code != 0) {
			text, _ := os.ReadFile(file)
			t.Errorf("repair: exit status %d, %v, %v: %s", code, err, werr, text)
		}
	}
	if !waited {
		t.Fatal("repair was never stopped while it had the root")
	}
	check(d.WaitReady(t.Context(), time.Minute, d.Healthy))
	wantCommitted(t, d, "layer")
	check(d.Stop())
}

// TestStaleSocket leaves sockets behind that no process listens on.
func TestStaleSocket(t *testing.T) {
	disk := newDisk(t, kit.DiskOptions{})
	d, err := kit.NewDaemon(kit.DaemonOptions{Binary: kittest.Binaries(t).Daemon, Dir: disk.Path("d"), RunDir: scratch(t)})
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
	d, err := kit.NewDaemon(kit.DaemonOptions{Binary: kittest.Binaries(t).Daemon, Dir: disk.Path("d"), RunDir: scratch(t)})
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

func wantCommitted(t *testing.T, d *kit.Daemon, name string) {
	t.Helper()
	if info, err := kittest.Connect(t, d).Stat(t.Context(), name); err != nil || info.Kind != snapshots.KindCommitted {
		t.Errorf("stat %s: %+v, %v", name, info, err)
	}
}
