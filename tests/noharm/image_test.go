package noharm

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// layerNames are those of the image's layers, lowest first. Each has a directory
// of its name.
var layerNames = []string{"base", "middle", "top"}

// built is the image in a registry whose files every node's own registry serves.
type built struct {
	dir   string
	image kit.Pushed
}

var image = sync.OnceValues(func() (built, error) {
	b := built{dir: filepath.Join(os.TempDir(), "registry")}
	r, err := kit.StartRegistry(b.dir)
	if err != nil {
		return b, err
	}
	defer r.Close()
	img, err := buildImage()
	if err != nil {
		return b, err
	}
	b.image, err = kit.Push(context.Background(), r, "noharm", img)
	return b, err
})

func buildImage() (kit.Image, error) {
	program, err := kit.Witness(context.Background())
	if err != nil {
		return kit.Image{}, err
	}
	witness, err := kit.FileFrom("bin/witness", 0o755, program)
	if err != nil {
		return kit.Image{}, err
	}
	base := []kit.Entry{
		kit.Dir("proc", 0o555), kit.Dir("sys", 0o555), kit.Dir("dev", 0o755), kit.Dir("bin", 0o755), witness,
		kit.Dir("hidden", 0o755), kit.File("hidden/file", 0o644, "hidden by an opaque directory"),
		kit.File("gone", 0o644, "hidden by a whiteout"),
		kit.Dir("priv", 0o700).WithOwner(1000, 1001),
	}
	base = append(base, kinds("base")...)
	middle := append(kinds("middle"),
		kit.Whiteout("gone"), kit.Dir("hidden", 0o711), kit.Opaque("hidden"), kit.File("hidden/new", 0o644, "new"))
	// priv has no entry in this layer.
	top := append(kinds("top"), kit.File("priv/x", 0o600, "mine").WithOwner(1000, 1001))
	return kit.Image{Layers: []kit.Layer{
		kit.NewLayer(kit.Gzip, seconds(base)...),
		kit.NewLayer(kit.Zstd, seconds(middle)...),
		kit.NewLayer(kit.Gzip, seconds(top)...),
	}}, nil
}

// seconds gives entries times in whole seconds, as image builders do: a tool
// that keeps no more has nothing to lose.
func seconds(entries []kit.Entry) []kit.Entry {
	for i := range entries {
		entries[i] = entries[i].WithTime(entries[i].ModTime.Truncate(time.Second))
	}
	return entries
}

// kinds are one of each kind of entry that some tool treats in its own way.
func kinds(layer string) []kit.Entry {
	at := func(name string) string { return layer + "/" + name }
	twin := strings.Repeat("the same in every layer\n", 800)
	return []kit.Entry{
		kit.Dir(layer, 0o755),
		kit.File(at("held"), 0o644, "held by "+layer),
		kit.Dir(at("watched"), 0o755),
		kit.File(at("watched/a"), 0o644, ""),
		kit.File(at("watched/b"), 0o644, ""),
		kit.File(at("linked"), 0o644, "two names in "+layer),
		kit.Hardlink(at("linked-too"), at("linked"), 0o644),
		kit.File(at("twin-a"), 0o644, twin),
		kit.File(at("twin-b"), 0o644, twin),
		kit.File(at("setuid"), 0o4755, "setuid"),
		kit.File(at("owned"), 0o640, "owned").WithOwner(4_000_000, 4_000_001),
		kit.File(at("capable"), 0o755, "capable").WithXattr("security.capability", kit.Capability(1<<10)),
		kit.File(at("attributed"), 0o644, "attributed").WithXattr("user.kept", "yes"),
		kit.File(at("acl"), 0o664, "more than a mode").WithXattr("system.posix_acl_access", acl(6, 6, 4)),
		kit.Symlink(at("symlink"), "held"),
		kit.Fifo(at("pipe"), 0o622),
		kit.Char(at("null"), 0o666, 1, 3),
		kit.File(at("zeros"), 0o644, strings.Repeat("\x00", 1<<20)),
		kit.File(at("big"), 0o644, strings.Repeat(layer+" has something to read\n", 10_000)),
		kit.Dir(at("mount-point"), 0o755),
		kit.File(at("mount-point/below"), 0o644, "below"),
	}
}

// acl is the value of system.posix_acl_access (linux/posix_acl_xattr.h): for the
// owner, a user, the group, the mask, and others.
func acl(owner, group, other uint16) string {
	entries := []struct {
		tag, perm uint16
		id        uint32
	}{{0x01, owner, ^uint32(0)}, {0x02, 4, 1000}, {0x04, group, ^uint32(0)}, {0x10, group, ^uint32(0)}, {0x20, other, ^uint32(0)}}
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range entries {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return string(b)
}

// watched are the paths that the container observes, with what it must see.
var watched = func() map[string]string {
	paths := map[string]string{"/hidden": "new"}
	for _, layer := range layerNames {
		paths["/"+layer+"/held"] = "held by " + layer
		paths["/"+layer+"/watched"] = "a b"
	}
	return paths
}()

// imageOfMany is an image with so many further layers.
func imageOfMany(layers int) (built, error) {
	b := built{dir: filepath.Join(os.TempDir(), "registry-of-many")}
	r, err := kit.StartRegistry(b.dir)
	if err != nil {
		return b, err
	}
	defer r.Close()
	img, err := buildImage()
	if err != nil {
		return b, err
	}
	for i := range layers {
		dir := fmt.Sprintf("further%d", i)
		img.Layers = append(img.Layers, kit.NewLayer(kit.Gzip, seconds([]kit.Entry{kit.Dir(dir, 0o755), kit.File(dir+"/file", 0o644, dir)})...))
	}
	b.image, err = kit.Push(context.Background(), r, "many", img)
	return b, err
}
