package storm

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// stormImage is an image in the registry, and what a container must see of it.
type stormImage struct {
	kit.Pushed
	name  string
	tree  kit.Tree
	links map[string]string
}

// body is content that does not compress, so that a pull has something to do.
func body(name string, size int) string {
	rng := rand.New(rand.NewPCG(uint64(len(name)), uint64(digest.FromString(name).Encoded()[0])))
	var b strings.Builder
	for b.Len() < size {
		fmt.Fprintf(&b, "%s %016x\n", name, rng.Uint64())
	}
	return b.String()
}

// pause is the name of the image of all sandboxes; containers run runs and pause.
const (
	pause = "pause"
	runs  = "runs"
)

// pushImages pushes images that share layers: chains with a common beginning, the same
// blob in different chains, and one image that is the beginning of another. Two of them
// have a program, and are what pods are made of.
func pushImages(ctx context.Context, r *kit.Registry) ([]stormImage, error) {
	base := kit.NewLayer(kit.Gzip,
		kit.Dir("etc", 0o711).WithOwner(0, 12), kit.File("etc/passwd", 0o644, "root"), kit.File("etc/motd", 0o644, body("motd", 40<<10)),
		kit.Dir("priv", 0o700).WithOwner(1000, 1001).WithXattr("user.note", "mine"), kit.File("priv/key", 0o600, "key").WithOwner(1000, 1001),
		kit.Dir("srv", 0o1777), kit.File("srv/old", 0o644, "old"),
		kit.Dir("bin", 0o755), kit.File("bin/tool", 0o4755, body("tool", 80<<10)), kit.Hardlink("bin/again", "bin/tool", 0o4755),
		kit.File("bin/able", 0o755, "able").WithXattr("security.capability", kit.Capability(1<<10)),
		kit.Symlink("link", "etc"), kit.Fifo("fifo", 0o600))
	inherits := kit.NewLayer(kit.Zstd, kit.File("priv/x/y", 0o644, body("y", 30<<10)), kit.File("etc/deep/er/file", 0o640, "deep"))
	removes := kit.NewLayer(kit.Gzip, kit.Whiteout("etc/passwd"), kit.Opaque("srv"), kit.File("srv/new", 0o644, "new"), kit.Whiteout("link"))
	returns := kit.NewLayer(kit.Plain, kit.File("etc/passwd", 0o600, "back"), kit.File("priv/x/z", 0o644, "z"), kit.Dir("link", 0o750))
	other := kit.NewLayer(kit.Gzip, kit.File("srv/other", 0o644, body("other", 60<<10)), kit.Dir("opt", 0o755).WithOwner(7, 8))
	second := kit.NewLayer(kit.Gzip, kit.Dir("etc", 0o755), kit.Dir("priv", 0o750).WithOwner(5, 5), kit.Dir("srv", 0o755), kit.File("etc/second", 0o644, body("second", 50<<10)), kit.Char("null", 0o666, 1, 3))
	top := kit.NewLayer(kit.Zstd, kit.File("priv/x/top", 0o644, body("top", 20<<10)), kit.Hardlink("priv/x/same", "priv/x/top", 0o644))
	runnable, err := kit.Runnable(ctx)
	if err != nil {
		return nil, err
	}
	dirs := kit.NewLayer(kit.Gzip, kit.Dir("proc", 0o555), kit.Dir("sys", 0o555), kit.Dir("dev", 0o755), kit.Dir("etc", 0o755))
	guest := runnable.Layers[1]
	var all []stormImage
	for i, layers := range [][]kit.Layer{
		{base, inherits, removes, returns},
		{base, inherits, other},
		{base, removes, top},
		{second},
		{second, inherits, other},
		{base, inherits, removes, returns, kit.NewLayer(kit.Gzip), other, top},
		{dirs, guest},
		{dirs, guest, inherits, other},
	} {
		img := kit.Image{Cmd: []string{"/bin/guest", "wait"}, Layers: layers}
		name := []string{"r1", "r2", "r3", "r4", "r5", "r6", pause, runs}[i]
		pushed, err := kit.Push(ctx, r, name, img)
		if err != nil {
			return nil, err
		}
		tree, links, err := img.Model()
		if err != nil {
			return nil, err
		}
		all = append(all, stormImage{pushed, name, tree, links})
	}
	return all, nil
}

// named is the image of a name.
func named(all []stormImage, name string) stormImage {
	return all[slices.IndexFunc(all, func(i stormImage) bool { return i.name == name })]
}

// with are the references of the images that have a layer, given by its chain ID,
// or by the digest of its blob.
func with(all []stormImage, id string) (refs []string) {
	for _, img := range all {
		has := slices.ContainsFunc(img.ChainIDs, func(d digest.Digest) bool { return d.String() == id })
		for _, l := range img.Layers {
			has = has || l.Digest.String() == id
		}
		if has {
			refs = append(refs, img.Ref)
		}
	}
	return refs
}

// blobOf is the digest of the blob of a layer, given by its chain ID.
func blobOf(all []stormImage, chainID string) digest.Digest {
	for _, img := range all {
		for i, id := range img.ChainIDs {
			if id.String() == chainID {
				return img.Layers[i].Digest
			}
		}
	}
	return ""
}
