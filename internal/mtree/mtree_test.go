package mtree

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
)

func TestVis(t *testing.T) {
	var all []byte
	for c := 1; c < 256; c++ {
		all = append(all, byte(c))
	}
	enc := string(AppendVis(nil, string(all)))
	if strings.ContainsAny(enc, " \t\n#=*?[") {
		t.Errorf("encoded as %q", enc)
	}
	if dec, err := Unvis(enc); err != nil || dec != string(all) {
		t.Errorf("decoded as %q, %v", dec, err)
	}
}

func TestTextDigest(t *testing.T) {
	path := filepath.Join(t.TempDir(), "text")
	w, err := Create(path, nil)
	treetest.Check(t, err)
	_, err = io.WriteString(w, ". type=dir\n./a type=dir\n./a/b type=file\n./a- type=file\n")
	treetest.Check(t, errors.Join(err, w.Close()))
	if got, err := TextDigest(path); err != nil || got != w.Digest() {
		t.Errorf("%s, %v, want %s", got, err, w.Digest())
	}
	for name, text := range map[string]string{
		"no header":    "./a type=file\n",
		"cut short":    header + "./a type=file",
		"out of order": header + "./b type=file\n./a type=file\n",
		"twice":        header + "./a type=file\n./a type=file\n",
		"not a path":   header + "a type=file\n",
		"empty line":   header + "\n",
		"no name":      header + "./ type=file\n",
		"leads out":    header + "./a/../../b type=file\n",
		"in two ways":  header + "./a/./b type=file\n",
		"zero byte":    header + "./a\\000b type=file\n",
	} {
		path, _ := treetest.Pack(t, text)
		if got, err := TextDigest(path); !errors.Is(err, ErrUnsealed) {
			t.Errorf("%s: %s, %v", name, got, err)
		}
	}
	if _, err := TextDigest(path + ".none"); !errors.Is(err, ErrUnsealed) {
		t.Errorf("no file: %v", err)
	}
}

// TestUnreadable: EIO of a text file alone is evidence that it is lost. The test of seals
// on a file system that has shut itself down is with package seal.
func TestUnreadable(t *testing.T) {
	path, _ := treetest.Pack(t, header)
	if err := unsealed(path, &os.PathError{Op: "read", Path: path, Err: unix.EIO}); !errors.Is(err, ErrUnsealed) {
		t.Errorf("EIO of the file alone: %v", err)
	}
}
