package contents

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
)

// readings are all ways to read. Each finds the same.
var readings = map[string]Reading{
	"usual":            {},
	"direct":           {Direct: true},
	"idle":             {Idle: true},
	"idle and limited": {Idle: true, Direct: true, Rate: 1 << 40},
}

func contentsOf(t testing.TB, root string) (path, digest string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "contents")
	digest, err := Write(t.Context(), root, path, Reading{})
	check(t, err)
	return path, digest
}

// contentDamage is damage to the content of withContent, and what must be found.
// Digests are left out.
var contentDamage = map[string]struct {
	change   func(root string) error
	contents string // what is found
	entry    bool   // of the entry and not its content: not by VerifyTar
}{
	"nothing":    {change: func(string) error { return nil }},
	"first byte": {change: func(r string) error { return flipIn(r+"/file", 0) }, contents: "file: sha256digest"},
	"last byte":  {change: func(r string) error { return flipIn(r+"/dir/chunk and a bit", chunk) }, contents: "dir/chunk and a bit: sha256digest"},
	"only byte":  {change: func(r string) error { return flipIn(r+"/dir/one", 0) }, contents: "dir/one: sha256digest"},
	"other names": {
		change:   func(r string) error { return flipIn(r+"/dir/big", 2*chunk) },
		contents: "dir/big: sha256digest dir/sub/big too: sha256digest",
	},
	"odd name": {change: func(r string) error { return flipIn(r+"/ odd \n#=*?[\\\"", 3) }, contents: " odd \n#=*?[\\\": sha256digest"},
	"replaced": {change: func(r string) error {
		return errors.Join(os.Remove(r+"/file"), os.WriteFile(r+"/file", []byte("CONTENT"), 0o644))
	}, contents: "file: sha256digest"},
	"emptied": {change: func(r string) error { return os.Truncate(r+"/dir/page", 0) }, contents: "dir/page: size was 4096, is 0"},
	"shorter": {change: func(r string) error { return os.Truncate(r+"/dir/chunk", chunk-1) }, contents: "dir/chunk: size was 1048576, is 1048575"},
	"longer":  {change: func(r string) error { return os.Truncate(r+"/dir/one", 2) }, contents: "dir/one: size was 1, is 2"},
	"zeros": {change: func(r string) error {
		return errors.Join(os.Truncate(r+"/dir/page", 0), os.Truncate(r+"/dir/page", 4096))
	}, contents: "dir/page: sha256digest"},
	"was empty": {
		change:   func(r string) error { return os.WriteFile(r+"/many/17", []byte("x"), 0o600) },
		contents: "many/17: size was 0, is 1",
	},
	"several": {
		change:   func(r string) error { return errors.Join(flipIn(r+"/file", 1), os.Truncate(r+"/dir/one", 0)) },
		contents: "dir/one: size was 1, is 0 file: sha256digest",
	},
	"removed": {change: func(r string) error { return os.Remove(r + "/file") }, contents: "file: missing", entry: true},
	"a directory now": {
		change:   func(r string) error { return errors.Join(os.Remove(r+"/file"), os.Mkdir(r+"/file", 0o755)) },
		contents: "file: type was file, is dir", entry: true,
	},
	"a pipe now": {
		change:   func(r string) error { return errors.Join(os.Remove(r+"/file"), unix.Mkfifo(r+"/file", 0o644)) },
		contents: "file: type was file, is fifo", entry: true,
	},
	"a link to the same now": {
		change:   func(r string) error { return errors.Join(os.Rename(r+"/file", r+"/f"), os.Symlink("f", r+"/file")) },
		contents: "file: type was file, is link", entry: true,
	},
	"below a link now": {
		change: func(r string) error {
			return errors.Join(os.Rename(r+"/dir/sub", r+"/moved"), os.Symlink("../moved", r+"/dir/sub"))
		},
		contents: "dir/sub/big too: missing dir/sub/file: missing", entry: true,
	},
	"root removed": {change: os.RemoveAll, contents: ".: missing"},
}

var digests = regexp.MustCompile(`sha256digest was [0-9a-f]{64}, is [0-9a-f]{64}`)

func TestVerifyContents(t *testing.T) {
	for name, c := range contentDamage {
		t.Run(name, func(t *testing.T) {
			root := withContent(t)
			path, digest := contentsOf(t, root)
			check(t, c.change(root))
			for how, reading := range readings {
				found, err := Verify(t.Context(), root, path, digest, 10, reading)
				check(t, err)
				if got := digests.ReplaceAllString(join(found), "sha256digest"); got != c.contents {
					t.Errorf("%s: found %q, want %q", how, got, c.contents)
				}
			}
		})
	}
}

// TestUnseenByMetadata: to read content is the only way to see some damage.
func TestUnseenByMetadata(t *testing.T) {
	root := withContent(t)
	path, s := sealOf(t, root)
	contents, digest := contentsOf(t, root)
	check(t, flipIn(root+"/file", 2))
	still(t, root)
	if found, err := seal.Verify(t.Context(), root, path, s.Digest, 10); err != nil || len(found) > 0 {
		t.Errorf("the seal sees it: %v %v", found, err)
	}
	if found, err := Verify(t.Context(), root, contents, digest, 10, Reading{}); err != nil || len(found) != 1 {
		t.Errorf("found %v, %v", found, err)
	}
}

func TestContentsLimit(t *testing.T) {
	root := withContent(t)
	path, digest := contentsOf(t, root)
	check(t, os.RemoveAll(root+"/many"))
	if found, err := Verify(t.Context(), root, path, digest, 3, Reading{}); err != nil || len(found) != 3 {
		t.Errorf("%d findings, %v", len(found), err)
	}
}

// TestBrokenContents: a list that is not the one that was written is no
// evidence against the tree.
func TestBrokenContents(t *testing.T) {
	root := withContent(t)
	path, digest := contentsOf(t, root)
	good, err := os.ReadFile(path)
	check(t, err)
	for name, bad := range map[string][]byte{
		"missing": nil, "empty": {}, "cut short": good[:len(good)/2], "flipped": flip(good, len(good)/2),
	} {
		t.Run(name, func(t *testing.T) {
			check(t, os.WriteFile(path, bad, 0o600))
			if name == "missing" {
				check(t, os.Remove(path))
			}
			if found, err := Verify(t.Context(), root, path, digest, 1000, Reading{}); !errors.Is(err, mtree.ErrUnsealed) {
				t.Errorf("findings %v, error %v", found, err)
			}
		})
	}
	t.Run("a seal", func(t *testing.T) { // has a digest, but no content
		path, s := sealOf(t, root)
		if found, err := Verify(t.Context(), root, path, s.Digest, 1000, Reading{}); !errors.Is(err, mtree.ErrUnsealed) {
			t.Errorf("findings %v, error %v", found, err)
		}
	})
}

// TestMtreeContents has an independent program check a tree against its seal and
// its list of contents, by the command that docs/formats.md gives.
func TestMtreeContents(t *testing.T) {
	if _, err := exec.LookPath("mtree"); err != nil {
		t.Skip("no mtree: apt-get install mtree-netbsd")
	}
	root := withContent(t)
	pieces(t, root+"/dir/sparse", 4<<20, 1<<20)
	still(t, root)
	dir := filepath.Dir(root)
	_, err := seal.Write(t.Context(), root, dir+"/seal")
	check(t, err)
	_, err = Write(t.Context(), root, dir+"/contents", Reading{})
	check(t, err)
	run := func() (string, error) {
		cmd := exec.CommandContext(t.Context(), "sh", "-c", `{ zcat seal | sed 's/ xattr[^ ]*//g'; zcat contents; } | mtree -p "$0"`, root)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := run(); err != nil || strings.TrimSpace(out) != "" {
		t.Fatalf("mtree finds differences: %v\n%s", err, out)
	}
	check(t, flipIn(root+"/dir/big", chunk+1))
	still(t, root)
	out, err := run()
	if err == nil || !strings.Contains(out, "dir/big: ") || !strings.Contains(out, "dir/sub/big too: ") || strings.Count(out, "\n") != 4 {
		t.Errorf("mtree does not read what the list has: %v\n%s", err, out)
	}
}

// TestHealthy: no alarm for ten thousand files that are as they were.
func TestHealthy(t *testing.T) {
	root := t.TempDir()
	for d := range 100 {
		dir := filepath.Join(root, fmt.Sprint("d", d))
		check(t, os.Mkdir(dir, 0o755))
		for f := range 100 {
			check(t, os.WriteFile(fmt.Sprintf("%s/%d", dir, f), []byte(strings.Repeat(fmt.Sprint(d, f), f)), 0o644))
		}
	}
	path, digest := contentsOf(t, root)
	if n := strings.Count(text(t, path), " type=file "); n != 10_000 {
		t.Errorf("%d files on the list", n)
	}
	for _, how := range []string{"usual", "idle and limited"} {
		reading := readings[how]
		if found, err := Verify(t.Context(), root, path, digest, 10, reading); err != nil || len(found) > 0 {
			t.Errorf("%s: found %v, %v", how, found, err)
		}
		if found, err := VerifyTar(t.Context(), root, tarOf(t, root), 10, reading); err != nil || len(found) > 0 {
			t.Errorf("%s: the tar differs: %v, %v", how, found, err)
		}
	}
}

func TestContentsCancelled(t *testing.T) {
	root := withContent(t)
	path, digest := contentsOf(t, root)
	for what, run := range map[string]func(context.Context, Reading) error{
		"Write": func(ctx context.Context, how Reading) error {
			_, err := Write(ctx, root, path+".again", how)
			return err
		},
		"Verify": func(ctx context.Context, how Reading) error {
			_, err := Verify(ctx, root, path, digest, 10, how)
			return err
		},
		"VerifyTar": func(ctx context.Context, how Reading) error {
			_, err := VerifyTar(ctx, root, tarOf(t, root), 10, how)
			return err
		},
	} {
		ctx, cancel := context.WithCancel(t.Context())
		began := time.Now()
		// At this rate all of it would take days.
		err := run(ctx, Reading{Rate: 10, Progress: func(int64) { cancel() }})
		if !errors.Is(err, context.Canceled) || time.Since(began) > time.Minute {
			t.Errorf("%s: %v after %v", what, err, time.Since(began))
		}
	}
}
