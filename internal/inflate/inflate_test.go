package inflate

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// text is n bytes that can be compressed.
func text(n int) []byte {
	r := rand.New(rand.NewPCG(1, 2))
	b := make([]byte, n)
	for i := range b {
		b[i] = "abcdefgh"[r.IntN(8)]
	}
	return b
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func packed(t testing.TB, kind string, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	var w io.WriteCloser
	switch kind {
	case "gzip":
		w = gzip.NewWriter(&out)
	case "zstd":
		e, err := zstd.NewWriter(&out)
		check(t, err)
		w = e
	default:
		return b
	}
	_, err := w.Write(b)
	check(t, errors.Join(err, w.Close()))
	return out.Bytes()
}

func fileOf(t testing.TB, b []byte) *os.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "blob")
	check(t, os.WriteFile(path, b, 0o600))
	f, err := os.Open(path)
	check(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

func igzip(t testing.TB) string {
	t.Helper()
	path := Igzip()
	if path == "" {
		t.Skip("igzip is not installed (package isal)")
	}
	return path
}

// blobs are streams, with what they hold.
func blobs(t testing.TB) map[string][2][]byte {
	big := text(3 << 20)
	var members []byte // as eStargz has them
	for i := 0; i < len(big); i += 100_000 {
		members = append(members, packed(t, "gzip", big[i:min(i+100_000, len(big))])...)
	}
	skippable := append([]byte{0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3}, packed(t, "zstd", big)...)
	return map[string][2][]byte{
		"plain": {big, big}, "empty": {nil, nil}, "one byte": {{7}, {7}}, "gzip": {packed(t, "gzip", big), big}, "gzip of nothing": {packed(t, "gzip", nil), nil},
		"gzip in members": {members, big}, "zstd": {packed(t, "zstd", big), big}, "zstd after a frame to skip": {skippable, big},
	}
}

// TestSame: every stream holds what containerd's decompressor finds in it.
func TestSame(t *testing.T) {
	t.Setenv("CONTAINERD_DISABLE_IGZIP", "1") // containerd's
	for name, b := range blobs(t) {
		theirs, err := compression.DecompressStream(bytes.NewReader(b[0]))
		check(t, err)
		want, err := io.ReadAll(theirs)
		check(t, err)
		r, err := Stream(bytes.NewReader(b[0]))
		check(t, err)
		have, err := io.ReadAll(r)
		check(t, errors.Join(err, r.Close()))
		if !bytes.Equal(have, b[1]) || !bytes.Equal(want, have) {
			t.Errorf("%s: %d bytes, containerd has %d, there are %d", name, len(have), len(want), len(b[1]))
		}
	}
}

// TestChild: igzip finds the same, from the beginning of the file, wherever its offset is.
func TestChild(t *testing.T) {
	program := igzip(t)
	for name, b := range blobs(t) {
		f := fileOf(t, b[0])
		_, err := f.Seek(5, io.SeekStart)
		check(t, err)
		r, err := File(t.Context(), f, program)
		check(t, err)
		have, err := io.ReadAll(r)
		check(t, errors.Join(err, r.Close()))
		if _, external := r.(*child); external != strings.HasPrefix(name, "gzip") {
			t.Errorf("%s: by another process: %v", name, external)
		}
		if !bytes.Equal(have, b[1]) {
			t.Errorf("%s: %d bytes, there are %d", name, len(have), len(b[1]))
		}
	}
}

// TestChildFails: whatever ends the child early is an error, and not the end of the stream.
func TestChildFails(t *testing.T) {
	program := igzip(t)
	good := packed(t, "gzip", text(8<<20))
	bad := bytes.Clone(good)
	bad[len(bad)/2] ^= 0xff
	for name, b := range map[string][]byte{"altered": bad, "cut short": good[:len(good)/2]} {
		r, err := File(t.Context(), fileOf(t, b), program)
		check(t, err)
		if _, err := io.ReadAll(r); !errors.Is(err, ErrChild) {
			t.Errorf("%s: %v", name, err)
		}
		check(t, r.Close())
	}

	r, err := File(t.Context(), fileOf(t, good), program)
	check(t, err)
	_, err = io.ReadFull(r, make([]byte, 1000))
	check(t, errors.Join(err, r.(*child).cmd.Process.Kill()))
	if _, err := io.ReadAll(r); !errors.Is(err, ErrChild) {
		t.Errorf("killed: %v", err)
	}
	check(t, r.Close())

	if _, err := File(t.Context(), fileOf(t, good), "/not/there"); !errors.Is(err, ErrChild) {
		t.Errorf("a program that is not there: %v", err)
	}
}

// TestChildEnds: with its context, and with Close, and leaves no process.
func TestChildEnds(t *testing.T) {
	program := igzip(t)
	good := packed(t, "gzip", text(8<<20))
	ctx, cancel := context.WithCancel(t.Context())
	r, err := File(ctx, fileOf(t, good), program)
	check(t, err)
	cancel()
	if _, err := io.ReadAll(r); !errors.Is(err, context.Canceled) {
		t.Errorf("its context has ended: %v", err)
	}
	check(t, r.Close())
	r, err = File(t.Context(), fileOf(t, good), program)
	check(t, errors.Join(err, r.Close()))
	if r.(*child).cmd.ProcessState == nil {
		t.Error("after Close, the child may still run")
	}
}

// TestIgzip: the switch of containerd counts.
func TestIgzip(t *testing.T) {
	igzip(t)
	t.Setenv("CONTAINERD_DISABLE_IGZIP", "true")
	if path := Igzip(); path != "" {
		t.Error(path)
	}
}
