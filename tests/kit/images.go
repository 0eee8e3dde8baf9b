package kit

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Standard returns the image of a name: "all-kinds", "empty-layers", "runnable" or
// "large".
func Standard(ctx context.Context, name string, b Binaries) (Image, error) {
	switch name {
	case "all-kinds":
		return AllKinds(), nil
	case "empty-layers":
		return EmptyLayers(), nil
	case "runnable":
		return Runnable(ctx)
	case "large":
		return Large(ctx, b)
	}
	return Image{}, fmt.Errorf("no standard image is called %q", name)
}

// AllKinds is an image with every kind of entry and every way in which a layer
// can change the one below: six layers in all three compressions.
func AllKinds() Image {
	return Image{Layers: []Layer{
		NewLayer(Gzip, kindsBase()...),
		NewLayer(Zstd, kindsRemoved()...),
		NewLayer(Plain, kindsReplaced()...),
		NewLayer(Gzip),
		NewLayer(Zstd, kindsReturned()...),
		NewLayer(Gzip, kindsBig()...),
	}}
}

// kindsBase has one of everything the later layers change.
func kindsBase() []Entry {
	long := strings.Repeat("n", 255)
	entries := []Entry{
		Dir("bin", 0o755),
		File("bin/plain", 0o755, "#!/bin/plain\n"),
		File("bin/setuid", 0o4755, "setuid"),
		File("bin/setgid", 0o2755, "setgid").WithOwner(0, 42),
		File("bin/setuid-owned", 0o6711, "both").WithOwner(1234, 4321),
		File("bin/capable", 0o755, "may bind port 80").WithXattr("security.capability", Capability(1<<10)),
		File("bin/capable-owned", 0o755, "chown clears it, so it comes after").WithOwner(7, 8).WithXattr("security.capability", Capability(1<<13)),
		Dir("tmp", 0o1777),
		Dir("var", 0o755),
		Dir("var/mail", 0o2775).WithOwner(0, 8),
		Dir("root", 0o700),
		Dir("home", 0o755),
		Dir("home/odd", 0o750).WithOwner(4_000_000, 4_000_001),
		File("home/odd/mine", 0o600, "mine").WithOwner(4_000_000, 4_000_001),
		File("home/odd/none", 0o000, "no mode at all"),
		Dir("links", 0o755),
		File("links/a", 0o644, "linked three times"),
		Hardlink("links/b", "links/a", 0o644),
		Hardlink("links/c", "links/a", 0o644),
		Symlink("links/relative", "a"),
		Symlink("links/absolute", "/links/a"),
		Symlink("links/dangling", "../nowhere/at all"),
		Symlink("links/long", strings.Repeat("../x/", 300)+"end").WithOwner(5, 6),
		Hardlink("links/symlink-twice", "links/relative", 0o777),
		Dir("dev", 0o755),
		Char("dev/null", 0o666, 1, 3),
		Char("dev/big", 0o600, 1000, 300000),
		Block("dev/block", 0o660, 7, 12).WithOwner(0, 6),
		Fifo("dev/pipe", 0o622),
		Dir("xattr", 0o755).WithXattr("user.dir", "on a directory"),
		File("xattr/user", 0o644, "").WithXattr("user.one", "1").WithXattr("user.binary", "\x01\xff\x02").WithXattr("user.empty", ""),
		File("xattr/long", 0o644, "x").WithXattr("user.long", strings.Repeat("v", 2000)),
		Dir("names", 0o755),
		File("names/ space ", 0o644, "space"),
		File("names/new\nline", 0o644, "newline"),
		File("names/tab\tquote\"back\\slash", 0o644, "quoting"),
		File("names/ünïcödé-日本", 0o644, "unicode"),
		File("names/not-utf8-\xff\xfe", 0o644, "bytes"),
		File("names/-rf", 0o644, "an option"),
		File("names/..almost", 0o644, "dots"),
		File("names/wh.not-a-whiteout", 0o644, "no leading dot"),
		File("names/"+long, 0o644, "255 bytes"),
		File("empty", 0o644, ""),
		File("old", 0o644, "from 1970").WithTime(time.Unix(1, 5)),
		File("future", 0o644, "after 2038").WithTime(time.Unix(5_000_000_000, 999_999_999)),
	}
	deep := "deep"
	for range 40 {
		entries = append(entries, Dir(deep, 0o711))
		deep += "/" + strings.Repeat("d", 40)
	}
	for _, top := range []string{"gone", "opaque", "swap", "parents", "modes"} {
		entries = append(entries, kindsSubtree(top)...)
	}
	return entries
}

// kindsSubtree is a directory for a later layer to remove or change.
func kindsSubtree(top string) []Entry {
	return []Entry{
		Dir(top, 0o755),
		File(top+"/file", 0o644, "file of "+top),
		Symlink(top+"/symlink", "file"),
		Dir(top+"/dir", 0o750).WithOwner(1000, 1000).WithXattr("user.kept", "yes"),
		File(top+"/dir/inner", 0o640, "inner of "+top).WithOwner(1000, 1000),
		Dir(top+"/dir/empty", 0o700),
	}
}

// kindsRemoved takes things away: a file, a symlink, one name of a hardlinked
// file, a tree, and by an opaque mark all that a directory held.
func kindsRemoved() []Entry {
	return []Entry{
		Dir("links", 0o755),
		Whiteout("links/b"),
		Dir("gone", 0o755),
		Whiteout("gone/file"),
		Whiteout("gone/symlink"),
		Whiteout("gone/dir"),
		Dir("opaque", 0o711),
		Opaque("opaque"),
		File("opaque/new", 0o644, "the only one"),
		Dir("modes", 0o1770).WithOwner(33, 33),
		Dir("bin", 0o755),
		File("bin/plain", 0o700, "changed by the second layer"),
		Whiteout("old"),
		Whiteout("never-there"),
	}
}

// kindsReplaced changes types, and puts files into directories that its own tar
// does not mention, so that their attributes must come from below.
func kindsReplaced() []Entry {
	return []Entry{
		Dir("swap", 0o755),
		Dir("swap/file", 0o755),
		File("swap/file/inside", 0o644, "file became directory"),
		File("swap/dir", 0o644, "directory became file"),
		Dir("swap/symlink", 0o700),
		File("parents/dir/added", 0o644, "the parents are not in this tar"),
		File("modes/dir/inner", 0o600, "overwritten").WithOwner(2, 2),
		Symlink("empty", "became/a/symlink"),
		Char("future", 0o600, 1, 5),
	}
}

// kindsReturned brings back what a layer between had removed.
func kindsReturned() []Entry {
	return []Entry{
		Dir("gone", 0o755),
		Dir("gone/dir", 0o700),
		File("gone/dir/fresh", 0o644, "inner must stay away"),
		File("gone/file", 0o755, "back again"),
		Hardlink("gone/file-too", "gone/file", 0o755),
		Dir("opaque", 0o755),
		Dir("opaque/dir", 0o755),
		Opaque("opaque/dir"),
		File("opaque/file", 0o644, "back in the opaque directory"),
		File("old", 0o600, "new again"),
		Dir("late", 0o755),
		Whiteout("late/nothing-below"),
	}
}

// kindsBig has content that does not fit one page: noise, and a hole's worth of
// zeros.
func kindsBig() []Entry {
	noise := make([]byte, 3<<20+17)
	random := rand.New(rand.NewPCG(1, 2))
	for i := range noise {
		noise[i] = byte(random.Uint32())
	}
	return []Entry{
		Dir("big", 0o755),
		File("big/noise", 0o644, string(noise)),
		File("big/zeros", 0o644, strings.Repeat("\x00", 4<<20)),
		File("big/page", 0o644, strings.Repeat("p", 4096)),
		Whiteout("home"),
	}
}

// EmptyLayers is an image most of whose layers have no entry at all, as a
// Dockerfile's ENV and LABEL lines used to make them.
func EmptyLayers() Image {
	return Image{Layers: []Layer{
		NewLayer(Gzip),
		NewLayer(Plain),
		NewLayer(Gzip, Dir("etc", 0o755), File("etc/only", 0o644, "the only file")),
		NewLayer(Zstd),
		NewLayer(Gzip),
		NewLayer(Plain, Dir("etc", 0o755), Whiteout("etc/only")),
		NewLayer(Gzip),
	}}
}

// Runnable is an image of three layers whose containers can do what the program
// in kit/guest can: wait, echo, print, write and sum files.
func Runnable(ctx context.Context) (Image, error) {
	file, err := BuildTool(ctx, "kit/guest")
	if err != nil {
		return Image{}, err
	}
	body, err := os.ReadFile(file)
	if err != nil {
		return Image{}, err
	}
	guest := File("bin/guest", 0o755, string(body))
	return Image{
		Cmd: []string{"/bin/guest", "echo", "hello from the image"},
		Layers: []Layer{
			NewLayer(Gzip, Dir("etc", 0o755), Dir("proc", 0o555), Dir("sys", 0o555), Dir("dev", 0o755), Dir("tmp", 0o1777),
				File("etc/motd", 0o644, "first layer\n"), File("etc/passwd", 0o644, "root:x:0:0::/:/bin/guest\n")),
			NewLayer(Zstd, Dir("bin", 0o755), guest, Hardlink("bin/again", "bin/guest", 0o755)),
			NewLayer(Plain, Dir("etc", 0o755), File("etc/motd", 0o644, "third layer\n"), Whiteout("etc/passwd")),
		},
	}, nil
}

// Large is an image of at least 20,000 inodes and 400 MiB, made of what a
// machine that can run these tests has anyway: the Go toolchain, the sources of
// some modules, and the programs that Build makes.
func Large(ctx context.Context, b Binaries) (Image, error) {
	tests, err := Module()
	if err != nil {
		return Image{}, err
	}
	goroot, err := run(ctx, tests, nil, "go", "env", "GOROOT")
	if err != nil {
		return Image{}, err
	}
	modules := []string{
		"github.com/containerd/containerd/v2", "github.com/klauspost/compress", "golang.org/x/text",
		"google.golang.org/grpc", "google.golang.org/protobuf", "go.opentelemetry.io/otel",
	}
	dirs, err := run(ctx, tests, nil, append([]string{"go", "list", "-m", "-f", "{{.Path}}\t{{.Dir}}"}, modules...)...)
	if err != nil {
		return Image{}, err
	}
	var sources []Place
	for line := range strings.Lines(dirs) {
		module, dir, ok := strings.Cut(strings.TrimSpace(line), "\t")
		if !ok || dir == "" {
			return Image{}, fmt.Errorf("large image: module %s is not in the module cache: run go mod download", module)
		}
		sources = append(sources, Place{dir, "src/" + module})
	}
	programs := []Entry{Dir("bin", 0o755)}
	for _, file := range []string{b.Containerd, b.Ctr, filepath.Join(b.Dir, "containerd-shim-runc-v2")} {
		e, err := FileFrom("bin/"+filepath.Base(file), 0o755, file)
		if err != nil {
			return Image{}, err
		}
		programs = append(programs, e)
	}
	return Image{Layers: []Layer{
		DirLayer(Gzip, []Place{{strings.TrimSpace(goroot), "usr/local/go"}}),
		DirLayer(Zstd, sources),
		NewLayer(Plain, programs...),
		NewLayer(Gzip, Dir("usr", 0o755), Dir("usr/local", 0o755), Dir("usr/local/go", 0o755), Whiteout("usr/local/go/api"), File("usr/local/go/VERSION", 0o644, "changed\n")),
	}}, nil
}
