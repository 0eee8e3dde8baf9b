package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/durable-snapshotter/durable-snapshotter/docs"
	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/images"
	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// TestDocumented: docs/operations.md has a row for each check, in their order.
func TestDocumented(t *testing.T) {
	var want strings.Builder
	for _, c := range Checks {
		fmt.Fprintf(&want, "| `%s` | %s | %s |\n", c.Name, c.Finds, c.Cure)
	}
	text, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), "|---|---|---|\n"+want.String()+"\n") {
		t.Errorf("docs/operations.md does not have this table:\n%s", want.String())
	}
	if len(Checks) != 24 {
		t.Errorf("there are %d checks", len(Checks))
	}
}

// TestPlatformTexts: each platform's text is, word for word, in docs/containerd.md.
func TestPlatformTexts(t *testing.T) {
	for _, name := range Platforms() {
		text, err := PlatformText(name, "")
		if err != nil {
			t.Error(err)
			continue
		}
		if !strings.Contains(text, "durable") {
			t.Errorf("%s: %q", name, text)
		}
		for _, key := range platforms[name] {
			if part := Texts(docs.Containerd)[key]; !strings.Contains(docs.Containerd, "\n"+part+"```\n") || !strings.Contains(text, part) {
				t.Errorf("%s: the text %q is not that of the document", name, key)
			}
			file := strings.TrimSuffix(strings.Fields(key)[0], ",")
			one, err := PlatformText(name, file)
			if err != nil || !strings.Contains(text, one) || !strings.Contains(one, " "+key+"\n") {
				t.Errorf("%s: the text for %s is %q, %v", name, file, one, err)
			}
			for _, other := range platforms[name] {
				if strings.Contains(one, " "+other+"\n") != strings.HasPrefix(other, file) {
					t.Errorf("%s: the text for %s has that of %q, or lacks it", name, file, other)
				}
			}
		}
	}
	if _, err := PlatformText("k9s", ""); !errors.Is(err, ErrPlatform) || !strings.Contains(err.Error(), "k3s") {
		t.Errorf("an unknown platform: %v", err)
	}
	if _, err := PlatformText("k3s", "/etc/fstab"); !errors.Is(err, ErrPlatform) || !strings.Contains(err.Error(), "/etc/rancher/k3s/config.yaml, ") {
		t.Errorf("an unknown file: %v", err)
	}
}

// parsed is a text of TOML.
func parsed(t *testing.T, text string) (has table) {
	t.Helper()
	if err := toml.Unmarshal([]byte(text), &has); err != nil {
		t.Fatalf("%v:\n%s", err, text)
	}
	return has
}

const proxy = "[proxy_plugins.durable]\n type='snapshot'\n address='/run/d.sock'\n"

// healthy are the facts of a node on which everything is as it should be.
func healthy(t *testing.T) *Facts {
	t.Helper()
	now := time.Date(2026, 11, 30, 12, 0, 0, 0, time.UTC)
	socket := Socket{Path: "/run/d.sock", Mode: fs.ModeSocket | 0o600}
	admin := socket
	admin.Path = "/run/admin.sock"
	f := &Facts{
		Config: Config{Root: "/var/lib/d", Address: "/run/d.sock", ContentRoot: "/var/lib/c/content", Snapshotter: "durable", RepairImages: true},
		Now:    now,
		Host: Host{
			Kernel: "6.1.0", Boot: "boot", Overlay: true, Disk: Disk{"sda", "write back", false}, Sync: time.Millisecond,
			Space: Space{100 << 30, 50 << 30, 1000, 900},
		},
		Sockets: []Socket{socket, admin},
		Unit: Unit{
			Loaded: true, File: "enabled", Before: []string{"containerd.service", "k3s.service"}, WantedBy: []string{"multi-user.target"},
			Containerd: []string{"containerd.service"},
		},
		Live: "/var/lib/d",
		Report: snapshotter.Report{
			Root:   "/var/lib/d",
			Layers: []verify.Result{{ID: 1, ChainID: "sha256:1", State: storage.StateReady}},
			Journal: snapshotter.JournalReport{
				Committed: []storage.CommitEntry{{ID: 1, Time: now.Add(-time.Hour)}},
				Run:       storage.Run{BootID: "boot", RunID: "run", Started: now.Add(-2 * time.Hour)},
			},
		},
		Running: Running{
			PID: 1, Version: "v2.4.2", Content: "/var/lib/c/content",
			Plugins: []repull.Plugin{
				{Type: snapshotType, ID: "overlayfs", Exports: map[string]string{"root": "/var/lib/c/overlayfs"}},
				{Type: snapshotType, ID: "durable", Exports: map[string]string{"root": "/var/lib/d", "address": "/run/d.sock"}, Capabilities: []string{"rebase"}},
				{Type: transferType, ID: "local"}, {Type: differType, ID: "walking"},
			},
			CRI: repull.CRI{ImageFs: "/var/lib/d"},
		},
	}
	f.Files.Dump = parsed(t, "version = 4\n"+proxy+"[plugins.'io.containerd.cri.v1.images']\n snapshotter='durable'\n"+
		"[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n snapshotter='durable'\n differ='walking'\n"+
		"[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n snapshotter='overlayfs'\n differ='walking'\n")
	f.Files.All = []File{{Path: "/etc/containerd/config.toml", Imported: true, Has: parsed(t, "version=3\n"+proxy)}}
	f.Content.Images = []images.Image{{Name: "pause", Names: []string{"pause"}, Verdict: images.Ready}, {Name: "app", Names: []string{"app"}, Verdict: images.Ready}}
	f.Content.Pinned = []string{"pause"}
	return f
}

func TestSilentOnHealthyFacts(t *testing.T) {
	found := Run(healthy(t))
	if Worst(found) != OK || len(found) != len(Checks) {
		t.Errorf("%+v", found)
	}
	for _, f := range found {
		if f.Cure != "" || strings.HasPrefix(f.Text, "not known") {
			t.Errorf("%+v", f)
		}
	}
}

// overlayfs makes pods use the built-in snapshotter, by these files.
func overlayfs(t *testing.T, f *Facts, dump string, files ...File) {
	f.Running.CRI.ImageFs = "/var/lib/c/overlayfs"
	f.Files.Dump = parsed(t, proxy+"[plugins.'io.containerd.cri.v1.images']\n snapshotter='"+dump+"'\n")
	f.Files.All = files
}

// TestFindings breaks one thing after the other.
func TestFindings(t *testing.T) {
	const criV2, criV3 = "[plugins.'io.containerd.grpc.v1.cri'.containerd]\n snapshotter='durable'\n", "[plugins.'io.containerd.cri.v1.images']\n snapshotter='durable'\n"
	const runc = "[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\n runtime_type='io.containerd.runc.v2'\n"
	about := func(w string) func(*testing.T, *Facts) {
		return func(_ *testing.T, f *Facts) {
			f.Host.Warnings = []fsync.Warning{{About: w, Problem: "the problem", Cure: "the cure"}}
		}
	}
	old := func(version string) func(*testing.T, *Facts) {
		return func(_ *testing.T, f *Facts) { f.Running.Version = version }
	}
	unpacks := func(text string) func(*testing.T, *Facts) {
		return func(t *testing.T, f *Facts) {
			f.Files.Dump = parsed(t, proxy+"[plugins.'io.containerd.cri.v1.images']\n snapshotter='durable'\n[plugins.'io.containerd.transfer.v1.local']\n"+text)
		}
	}
	image := func(name string, v images.Verdict) func(*testing.T, *Facts) {
		return func(_ *testing.T, f *Facts) {
			f.Content.Images = []images.Image{{Name: name, Names: []string{name}, Verdict: v, Reason: "the reason"}}
		}
	}
	main := func(t *testing.T, text string) File {
		return File{Path: "/etc/containerd/config.toml", Imported: true, Has: parsed(t, text)}
	}
	dropIn := func(t *testing.T, text string, imported bool) File {
		return File{Path: "/etc/containerd/conf.d/durable.toml", Imported: imported, Has: parsed(t, text)}
	}
	for _, c := range []struct {
		name   string
		breaks func(*testing.T, *Facts)
		check  string
		level  Level
		text   string // of the finding
		cure   string // a part of it
	}{
		{"old kernel", about(fsync.AboutKernel), "kernel", Warning, "the problem", "the cure"},
		{"no overlayfs", func(_ *testing.T, f *Facts) { f.Host.Overlay = false }, "kernel", Warning, "overlay", "modprobe"},
		{"tmpfs", func(_ *testing.T, f *Facts) { f.Host.FSErr = fsync.ErrUnsuitable }, "filesystem", Failure, "unsuitable", "ext4, xfs or btrfs"},
		{"f2fs", about(fsync.AboutType), "filesystem", Warning, "the problem", "the cure"},
		{"no journal", about(fsync.AboutNoJournal), "journal", Failure, "the problem", "the cure"},
		{"nobarrier", about(fsync.AboutBarrier), "journal", Failure, "the problem", "the cure"},
		{"data=writeback", about(fsync.AboutData), "journal", Warning, "the problem", "the cure"},
		{"masked /proc", about(fsync.AboutUnknown), "journal", Warning, "the problem", "the cure"},
		{"SD card", func(_ *testing.T, f *Facts) { f.Host.Disk.Name = "mmcblk0" }, "disk", Warning, "mmcblk0", "power loss"},
		{"USB stick", func(_ *testing.T, f *Facts) { f.Host.Disk.Removable = true }, "disk", Warning, "sda", "power loss"},
		{"slow sync", func(_ *testing.T, f *Facts) { f.Host.Sync = 6 * time.Second }, "sync", Warning, "took 6s", "a disk of their own"},
		{"EIO of a sync", func(_ *testing.T, f *Facts) { f.Host.SyncErr = syscall.EIO }, "sync", Failure, "input/output", "replace"},
		{"etcd", func(_ *testing.T, f *Facts) { f.Host.Sharing = []string{"/var/lib/etcd"} }, "neighbors", Warning, "/var/lib/etcd", "of their own"},
		{"14 % free", func(_ *testing.T, f *Facts) { f.Host.Space.Avail = 14 << 30 }, "space", Warning, "14 %", "enlarge"},
		{"2 % free", func(_ *testing.T, f *Facts) { f.Host.Space.Avail = 2 << 30 }, "space", Failure, "2 %", "enlarge"},
		{"inodes", func(_ *testing.T, f *Facts) { f.Host.Space.FilesFree = 40 }, "space", Warning, "4 % of the inodes", "enlarge"},
		{"no socket", func(_ *testing.T, f *Facts) { f.Sockets[0].Err = fs.ErrNotExist }, "sockets", Failure, "no socket", "systemctl start"},
		{"stale socket", func(_ *testing.T, f *Facts) { f.Sockets[1].Refuse = syscall.ECONNREFUSED }, "sockets", Failure, "/run/admin.sock", "systemctl start"},
		{"file in its place", func(_ *testing.T, f *Facts) { f.Sockets[0].Mode = 0o600 }, "sockets", Failure, "not a socket", "remove"},
		{"mode", func(_ *testing.T, f *Facts) { f.Sockets[0].Mode |= 0o066 }, "sockets", Failure, "0666", "chmod 0600 /run/d.sock"},
		{"other root", func(_ *testing.T, f *Facts) { f.Live = "/elsewhere" }, "sockets", Failure, "/elsewhere", "one daemon"},
		{"no unit", func(_ *testing.T, f *Facts) { f.Unit = Unit{} }, "unit", Warning, "no unit", "install"},
		{"not enabled", func(_ *testing.T, f *Facts) { f.Unit.File = "disabled" }, "unit", Failure, "disabled", "systemctl enable"},
		{"with containerd only", func(_ *testing.T, f *Facts) { f.Unit.WantedBy = []string{"containerd.service"} }, "unit", Warning, "containerd.service", "multi-user.target"},
		{"not ordered", func(_ *testing.T, f *Facts) { f.Unit.Containerd = []string{"k0sworker.service"} }, "unit", Warning, "not ordered", "Before=k0sworker.service"},
		{"required", func(_ *testing.T, f *Facts) { f.Unit.RequiredBy = []string{"containerd.service"} }, "unit", Warning, "requires", "RequiredBy"},
		{"brake", func(_ *testing.T, f *Facts) { f.Report.Brake = "too much" }, "shutdown", Failure, "too much", "repair --apply"},
		{"damaged", func(_ *testing.T, f *Facts) { f.Report.Layers[0].State = storage.StateDamaged }, "shutdown", Failure, "sha256:1", "repair"},
		{"unverified", func(_ *testing.T, f *Facts) { f.Report.Layers[0].State = storage.StateUnverified }, "shutdown", Warning, "not verified", "check"},
		{"image check", func(_ *testing.T, f *Facts) { f.Report.Journal.Run.Epoch = 1 }, "shutdown", Warning, "not finished", "log"},
		{"unclean", func(_ *testing.T, f *Facts) { f.Live, f.Host.Boot = "", "another" }, "shutdown", Warning, "went down", "start the daemon"},
		{"clock", func(_ *testing.T, f *Facts) { f.Now = f.Now.Add(-24 * time.Hour) }, "clock", Warning, "2026-11-29", "chrony"},
		{"SELinux", func(_ *testing.T, f *Facts) { f.Host.SELinux, f.Host.Label = true, "system_u:object_r:var_lib_t:s0" }, "selinux", Warning, "var_lib_t", "restorecon"},
		{"containerd down", func(_ *testing.T, f *Facts) { f.Running = Running{Err: syscall.ECONNREFUSED} }, "plugin", Failure, "refused", "start containerd"},
		{"not restarted", func(_ *testing.T, f *Facts) { f.Running.Plugins = f.Running.Plugins[:1] }, "plugin", Failure, "and the running containerd does not", "restart containerd"},
		{"nowhere", func(t *testing.T, f *Facts) {
			f.Running.Plugins, f.Files.Dump = f.Running.Plugins[:1], parsed(t, "version=3\n")
		}, "plugin", Failure, "none either", "--print-config"},
		{"a drop-in that is not imported", func(t *testing.T, f *Facts) {
			f.Running.Plugins, f.Files.Dump = f.Running.Plugins[:1], parsed(t, "version=3\n")
			f.Files.All = append(f.Files.All, dropIn(t, "version=3\n"+proxy, false))
		}, "plugin", Failure, "is not imported by /etc/containerd/config.toml", `imports = ["/etc/containerd/conf.d/*.toml"]`},
		{"only until the restart", func(t *testing.T, f *Facts) { f.Files.Dump = parsed(t, "version=3\n") }, "plugin", Failure, "no more", "--print-config"},
		{"two names", func(_ *testing.T, f *Facts) { f.Running.Plugins = append(f.Running.Plugins, f.Running.Plugins[1]) }, "plugin", Warning, "several names", "one of them"},
		{"no export", func(_ *testing.T, f *Facts) { delete(f.Running.Plugins[1].Exports, "root") }, "plugin", Warning, "wrong file system", "exports"},
		{"rebase before 2.3", old("v2.2.9"), "plugin", Warning, "rebase", "before 2.3"},
		{"other name", func(_ *testing.T, f *Facts) { f.Snapshotter = "d" }, "plugin", Warning, "durable at containerd, and d", "[containerd] snapshotter"},
		{"broken file", func(_ *testing.T, f *Facts) { f.Files.Broken = errors.New("table a already exists") }, "containerd-config", Failure, "already exists", "remove"},
		{"diff on 1.6", func(t *testing.T, f *Facts) {
			old("1.6.20~ds1")(t, f)
			f.Files.All = []File{main(t, "[proxy_plugins.x]\n type='diff'\n")}
		}, "containerd-config", Failure, "panics", "remove"},
		{"CRI not restarted", func(t *testing.T, f *Facts) { overlayfs(t, f, "durable", main(t, criV3)) }, "cri-snapshotter", Failure, "was not restarted", "restart containerd"},
		{"version 2 without runtimes", func(t *testing.T, f *Facts) { overlayfs(t, f, "overlayfs", main(t, "version=2\n"+criV2)) }, "cri-snapshotter", Failure, "no table containerd.runtimes", "runtimes.runc"},
		{"not imported", func(t *testing.T, f *Facts) {
			overlayfs(t, f, "overlayfs", main(t, "version=3\n"), dropIn(t, "version=3\n"+criV3, false))
		}, "cri-snapshotter", Failure, "is not imported by", `imports = ["/etc/containerd/conf.d/*.toml"]`},
		{"drop-in of version 2", func(t *testing.T, f *Facts) {
			overlayfs(t, f, "overlayfs", main(t, "version=3\n"), dropIn(t, "version=2\n"+criV2+runc, true))
		}, "cri-snapshotter", Failure, "is of version 2, and /etc/containerd/config.toml of version 3", "version of the main file"},
		{"table of version 2", func(t *testing.T, f *Facts) { overlayfs(t, f, "overlayfs", main(t, "version=3\n"+criV2+runc)) }, "cri-snapshotter", Failure, "a table of version 2", "io.containerd.cri.v1.images"},
		{"runtime's table", func(t *testing.T, f *Facts) {
			overlayfs(t, f, "overlayfs", main(t, "version=3\n[plugins.'io.containerd.cri.v1.runtime'.containerd]\n snapshotter='durable'\n"))
		}, "cri-snapshotter", Failure, "no such key", "io.containerd.cri.v1.images"},
		{"no file", func(t *testing.T, f *Facts) { overlayfs(t, f, "overlayfs", main(t, "version=3\n")) }, "cri-snapshotter", Failure, "no file sets another", "--print-config"},
		{"no more after a restart", func(t *testing.T, f *Facts) {
			overlayfs(t, f, "overlayfs", main(t, "version=3\n"))
			f.Running.CRI.ImageFs = "/var/lib/d"
		}, "cri-snapshotter", Failure, "after a restart", "--print-config"},
		{"a runtime's own", func(_ *testing.T, f *Facts) { f.Running.CRI.Runtimes = map[string]string{"kata": "nydus"} }, "cri-snapshotter", Warning, "kata", "remove snapshotter"},
		{"CRI down", func(_ *testing.T, f *Facts) {
			f.Running.CRIErr = repull.ErrNoCRI
			f.Running.Plugins = append(f.Running.Plugins, repull.Plugin{Type: "io.containerd.grpc.v1", ID: "cri", Failed: "no such snapshotter"})
		}, "cri-snapshotter", Failure, "no such snapshotter", "restart"},
		{"unpack_config is empty", unpacks(""), "unpack-config", Failure, "no unpack platforms defined", "differ"},
		{"the same with local pulls", func(t *testing.T, f *Facts) {
			unpacks("")(t, f)
			f.Files.images()["use_local_image_pull"] = true
		}, "unpack-config", Warning, "ctr", "differ"},
		{"misspelled", unpacks("[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n snapshotter='durabel'\n"), "unpack-config", Failure, `"durabel", which is not registered`, "correct"},
		{"differ", unpacks("[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n snapshotter='durable'\n differ='runs'\n"), "unpack-config", Failure, `"runs", which is not registered`, "walking"},
		{"overlayfs is in use", func(t *testing.T, f *Facts) {
			unpacks("[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n snapshotter='durable'\n")(t, f)
			f.Content.Others = map[string]int{"overlayfs": 1}
		}, "unpack-config", Warning, "no entry for overlayfs", "differ"},
		{"transfer down", func(_ *testing.T, f *Facts) { f.Running.Plugins[2].Failed = "not found" }, "unpack-config", Failure, "not found", "entry"},
		{"discards", func(_ *testing.T, f *Facts) { f.Files.images()["discard_unpacked_layers"] = true }, "discarded-blobs", Warning, "discard_unpacked_layers", "false"},
		{"1.6 without exports", old("1.6.20~ds1"), "versions", Warning, "exports", "1.6.32"},
		{"1.7 without exports", old("v1.7.15"), "versions", Warning, "exports", "1.7.16"},
		{"digest pause", old("v2.3.0-rc.1"), "versions", Warning, "digest", "2.3.4"},
		{"no content_root", func(_ *testing.T, f *Facts) { f.ContentRoot = "" }, "content-root", Warning, "is empty", "content_root"},
		{"foreign content_root", func(_ *testing.T, f *Facts) { f.ContentRoot = "/var/lib/x" }, "content-root", Failure, "/var/lib/x", `"/var/lib/c/content"`},
		{"pause is broken", image("pause", images.NeedsFetch), "pinned-images", Failure, "the reason", "pull"},
		{"pause has no blobs", image("pause", images.Incomplete), "pinned-images", Warning, "the reason", "pull"},
		{"pause is elsewhere", image("pause", images.NotOurs), "pinned-images", Warning, "the reason", "migrate"},
		{"image is broken", image("app", images.InUse), "images", Failure, "app (in use and broken)", "repair --images"},
		{"image lacks blobs", image("app", images.Incomplete), "images", Warning, "without all blobs: app", "pull them"},
		{"image is elsewhere", image("app", images.NotOurs), "images", Warning, "another snapshotter only: app", "migrate"},
		{"containers", func(_ *testing.T, f *Facts) {
			f.Content.Foreign = map[string][]string{"overlayfs": {"container a", "container b", "container c", "container d"}}
		}, "containers", Warning, "4 containers on overlayfs: container a, container b, container c and 1 more", "drain"},
		{"orphans", func(_ *testing.T, f *Facts) { f.Content.Orphans = []string{"snapshot 7"} }, "orphans", Warning, "snapshot 7", "--orphans"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := healthy(t)
			c.breaks(t, f)
			found := Run(f)
			if i := slices.IndexFunc(found, func(f Finding) bool {
				return f.Check == c.check && f.Level == c.level && strings.Contains(f.Text, c.text) && strings.Contains(f.Cure, c.cure)
			}); i < 0 {
				t.Errorf("%s of %s with %q, cure %q, is not in %+v", c.level, c.check, c.text, c.cure, found)
			}
			if !slices.IsSortedFunc(found, func(a, b Finding) int { return rank(b.Level) - rank(a.Level) }) {
				t.Error("the worst is not the first")
			}
		})
	}
}

// TestCannotSay: what is not known is neither found nor denied.
func TestCannotSay(t *testing.T) {
	f := healthy(t)
	f.Content.ForeignErr, f.Content.OrphansErr = syscall.ECONNREFUSED, syscall.ECONNREFUSED
	f.Content.Images[0].Verdict, f.Content.Images[1].Verdict = images.Unknown, images.Unknown
	f.Files = Files{Err: errors.New("no program")}
	f.Unit.Err = errors.New("no systemd")
	f.Running.Version, f.Running.Content = "", ""
	f.Host.Space, f.Host.Disk = Space{}, Disk{}
	unclear := []string{
		"disk", "space", "unit", "containerd-config", "unpack-config", "sync-knobs", "discarded-blobs", "versions", "content-root", "pinned-images", "images", "containers", "orphans",
	}
	for _, one := range Run(f) {
		if one.Level != OK || strings.HasPrefix(one.Text, "not known: ") != slices.Contains(unclear, one.Check) {
			t.Errorf("%+v", one)
		}
	}
}

// TestRead: imports are followed as containerd follows them, and drop-ins that are not imported are known
// as such.
func TestRead(t *testing.T) {
	dir := t.TempDir()
	for path, text := range map[string]string{
		"config.toml": "version = 3\nimports = ['more/a.toml', '" + dir + "/config.toml']\n", "more/a.toml": "version = 3\nimports = ['b.toml']\n",
		"more/b.toml": "version = 2\n", "conf.d/c.toml": "version = [\n", "config-v3.toml.d/d.toml": "version = 3\n",
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, path), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got := ""
	for _, f := range read(filepath.Join(dir, "config.toml")) {
		got += fmt.Sprintf("%s imported=%v version=%d error=%v\n", strings.TrimPrefix(f.Path, dir+"/"), f.Imported, f.Has.version(), f.Err != nil)
	}
	const want = `config.toml imported=true version=3 error=false
more/a.toml imported=true version=3 error=false
more/b.toml imported=true version=2 error=false
conf.d/c.toml imported=false version=0 error=true
config-v3.toml.d/d.toml imported=false version=3 error=false
`
	if got != want {
		t.Errorf("%s\nwant\n%s", got, want)
	}
}

// TestKnobsAreHarmless: what has no effect is named, and is no warning.
func TestKnobsAreHarmless(t *testing.T) {
	f := healthy(t)
	f.Files.images()["image_pull_with_sync_fs"] = true
	f.Files.Dump.at("plugins")[diffService] = map[string]any{"sync_fs": true}
	if found := syncKnobs(f); found[0].Level != OK || !strings.Contains(found[0].Text, "image_pull_with_sync_fs and sync_fs") {
		t.Errorf("%+v", found)
	}
}

// TestRelease: versions as containerd and distributions write them.
func TestRelease(t *testing.T) {
	for text, want := range map[string][3]int{
		"v2.4.2": {2, 4, 2}, "1.6.20~ds1": {1, 6, 20}, "2.3.0-rc.1": {2, 3, 0}, "v2.3.4-k3s1.36": {2, 3, 4}, "2.4.2+unknown": {2, 4, 2},
	} {
		if v, ok := release(text); !ok || v != want {
			t.Errorf("%s: %v, %v", text, v, ok)
		}
	}
	for _, text := range []string{"", "unknown", "2", "v2.x.1"} {
		if v, ok := release(text); ok {
			t.Errorf("%q is %v", text, v)
		}
	}
}

// TestDiskOfPartition: the cache is that of the disk.
func TestDiskOfPartition(t *testing.T) {
	dir := t.TempDir()
	sda := filepath.Join(dir, "devices", "sda")
	for path, text := range map[string]string{"sda1/partition": "1\n", "queue/write_cache": "write back\n", "removable": "1\n"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(sda, path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(sda, path), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(filepath.Join(sda, "sda1"), filepath.Join(dir, "8:1")); err != nil {
		t.Fatal(err)
	}
	if d := diskAt(dir, 8, 1); d != (Disk{"sda", "write back", true}) {
		t.Errorf("%+v", d)
	}
	if d := diskAt(dir, 8, 2); d != (Disk{}) {
		t.Errorf("a device that does not exist: %+v", d)
	}
}

// TestConfigFlag: each spelling that containerd's command line takes.
func TestConfigFlag(t *testing.T) {
	for _, line := range []string{"containerd -c F", "containerd --config F", "containerd --config=F", "containerd -c=F -a x", "containerd -a x -config F"} {
		if v := configFlag(strings.Fields(line)); v != "F" {
			t.Errorf("%s: %q", line, v)
		}
	}
	if v := configFlag([]string{"containerd", "--log-level", "info"}); v != "" {
		t.Errorf("no flag: %q", v)
	}
}
