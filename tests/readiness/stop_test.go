package readiness

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// stopLimit is what a stop may take. It takes five seconds at most on a machine
// that does nothing else.
const stopLimit = 10 * time.Second

// The layer that everything takes long with: one large file and many small ones.
const (
	largeFile  = 256 << 20
	smallFiles = 5000
)

// stopping is a daemon with one large layer, and its blob in a content store.
type stopping struct {
	daemon  *kit.Daemon
	content string
	blob    string // the file of the layer's blob
	aside   string // a directory on the disk of the daemon's root
	name    string
	sn      snapshots.Snapshotter
	socket  net.Listener // of a containerd that accepts connections and answers nothing
	called  chan struct{}
}

func newStopping(t *testing.T) *stopping {
	t.Helper()
	dir := scratch(t)
	s := &stopping{content: filepath.Join(dir, "content"), called: make(chan struct{}, 100)}
	raw, packed := largeLayer(t)
	diffID := digest.FromBytes(raw)
	chainID := identity.ChainID([]digest.Digest{diffID})
	s.name = "k8s.io/2/" + chainID.String()
	put := func(mediaType string, p []byte) ocispec.Descriptor {
		d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(p), Size: int64(len(p))}
		path := filepath.Join(s.content, "blobs", "sha256", d.Digest.Encoded())
		check(t, os.MkdirAll(filepath.Dir(path), 0o755))
		check(t, os.WriteFile(path, p, 0o444))
		return d
	}
	layer := put(ocispec.MediaTypeImageLayerGzip, packed)
	s.blob = filepath.Join(s.content, "blobs", "sha256", layer.Digest.Encoded())
	config := put(ocispec.MediaTypeImageConfig, must[[]byte](t)(json.Marshal(ocispec.Image{RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{diffID}}})))
	put(ocispec.MediaTypeImageManifest, must[[]byte](t)(json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: []ocispec.Descriptor{layer},
	})))

	socket := filepath.Join(dir, "containerd.sock")
	s.socket = must[net.Listener](t)(net.Listen("unix", socket))
	t.Cleanup(func() { s.socket.Close() })
	go func() {
		for {
			conn, err := s.socket.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { conn.Close() })
			s.called <- struct{}{}
		}
	}()
	disk := kittest.NewDisk(t, kit.DiskOptions{FS: "ext4"})
	s.aside = disk.Path("aside")
	check(t, os.Mkdir(s.aside, 0o755))
	s.daemon = must[*kit.Daemon](t)(kit.NewDaemon(kit.DaemonOptions{
		Binary: kittest.Binaries(t).Daemon, Dir: disk.Path("durable"), RunDir: filepath.Join(dir, "run"), ContentRoot: s.content, Containerd: socket,
		// Scrubbing reads all the time, and slowly.
		Config: "[scrub]\ninterval = '1s'\ndepth = 'content'\nrate = 1000000\n",
	}))
	t.Cleanup(func() {
		if s.sn != nil {
			s.sn.Close()
		}
		if s.daemon.Process != nil {
			if t.Failed() {
				t.Log(s.daemon.LogTail(4000))
			}
			_ = s.daemon.Kill()
		}
	})
	s.start(t)

	key := "k8s.io/1/extract-1-x " + chainID.String()
	mounts, err := s.sn.Prepare(t.Context(), key, "")
	check(t, err)
	_, err = archive.Apply(t.Context(), mounts[0].Source, bytes.NewReader(raw))
	check(t, err)
	check(t, s.sn.Commit(t.Context(), s.name, key))
	return s
}

// largeLayer is a layer as a tar file, and compressed.
func largeLayer(t *testing.T) (raw, packed []byte) {
	t.Helper()
	var b, z bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(h tar.Header, content []byte) {
		h.Size, h.ModTime = int64(len(content)), time.Unix(1_600_000_000, 0)
		check(t, w.WriteHeader(&h))
		_, err := w.Write(content)
		check(t, err)
	}
	add(tar.Header{Typeflag: tar.TypeDir, Name: "dir/", Mode: 0o755}, nil)
	for i := range smallFiles {
		add(tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprint("dir/", i), Mode: 0o644}, []byte("x"))
	}
	add(tar.Header{Typeflag: tar.TypeReg, Name: "large", Mode: 0o644}, make([]byte, largeFile))
	check(t, w.Close())
	zw := must[*gzip.Writer](t)(gzip.NewWriterLevel(&z, gzip.BestSpeed))
	_, err := zw.Write(b.Bytes())
	check(t, errors.Join(err, zw.Close()))
	return b.Bytes(), z.Bytes()
}

func (s *stopping) start(t *testing.T) {
	t.Helper()
	check(t, s.daemon.Start(t.Context()))
	if s.sn != nil {
		s.sn.Close() // and with it the backoff of its connection
	}
	s.sn = must[snapshots.Snapshotter](t)(s.daemon.Snapshotter())
}

// layer is the directory of the layer.
func (s *stopping) layer(t *testing.T) string {
	t.Helper()
	dirs := must[[]string](t)(filepath.Glob(filepath.Join(s.daemon.Root, "snapshots", "*", "seal")))
	if len(dirs) == 0 {
		t.Fatal("the layer has no directory")
	}
	return filepath.Dir(dirs[0])
}

// lose takes the layer's tree away, which a call of Stat notices at once. It is gone in
// one step: a scrub that met half of it would find other damage, which is not confirmed.
func (s *stopping) lose(t *testing.T) {
	t.Helper()
	aside := filepath.Join(s.aside, fmt.Sprint(time.Now().UnixNano()))
	check(t, os.Rename(filepath.Join(s.layer(t), "fs"), aside))
	check(t, os.RemoveAll(aside))
}

// refused calls Stat of the layer until the answer is an error: a call is answered
// by what is known while the layer is being verified.
func (s *stopping) refused(ctx context.Context) error {
	for {
		if _, err := s.sn.Stat(ctx, s.name); err != nil {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// healing waits until the layer is being extracted again.
func (s *stopping) healing(t *testing.T) {
	t.Helper()
	waitFor(t, time.Minute, func() error {
		if found, err := filepath.Glob(filepath.Join(s.daemon.Root, "healing", "*")); err != nil || len(found) == 0 {
			return fmt.Errorf("nothing is extracted: %v", err)
		}
		return nil
	})
}

// TestStopInTime stops the daemon in the middle of everything that takes long.
// It ends in time, those who wait get an answer, and the next boot knows that the
// stop was clean. The answers about Commits are true.
func TestStopInTime(t *testing.T) {
	s := newStopping(t)
	ctx := t.Context()
	// background runs a call that the stop is going to end.
	background := func(call func() error) chan error {
		answer := make(chan error, 1)
		go func() { answer <- call() }()
		return answer
	}
	stopped := func(t *testing.T, answer chan error) {
		t.Helper()
		if err := <-answer; err != nil && !errdefs.IsUnavailable(err) && !errdefs.IsCanceled(err) {
			t.Errorf("answered with %v", err)
		}
	}
	for _, situation := range []struct {
		name  string
		begin func(t *testing.T) (end func(t *testing.T))
	}{
		{"idle", func(t *testing.T) func(*testing.T) { return func(*testing.T) {} }},
		{"scrub", func(t *testing.T) func(*testing.T) {
			time.Sleep(2 * time.Second)
			return func(*testing.T) {}
		}},
		{"list to a client that does not read", func(t *testing.T) func(*testing.T) {
			label := snapshots.WithLabels(kit.Labels(128 << 10))
			for i := range 20 {
				_, err := s.sn.Prepare(ctx, fmt.Sprint("labelled-", i), "", label)
				check(t, err)
			}
			conn, err := s.daemon.Dial()
			check(t, err)
			t.Cleanup(func() { conn.Close() })
			_, err = snapshotsapi.NewSnapshotsClient(conn).List(ctx, &snapshotsapi.ListSnapshotsRequest{Snapshotter: "durable"})
			check(t, err)
			time.Sleep(300 * time.Millisecond)
			return func(t *testing.T) {
				for i := range 20 {
					check(t, s.sn.Remove(ctx, fmt.Sprint("labelled-", i)))
				}
			}
		}},
		{"deletion of a deep tree", func(t *testing.T) func(*testing.T) {
			mounts, err := s.sn.Prepare(ctx, "deep", "")
			check(t, err)
			deepen(t, mounts[0].Source, 20_000)
			check(t, s.sn.Remove(ctx, "deep"))
			answer := background(func() error { return s.sn.(snapshots.Cleaner).Cleanup(ctx) })
			time.Sleep(50 * time.Millisecond)
			return func(t *testing.T) { stopped(t, answer) }
		}},
		{"commit of a large tree", func(t *testing.T) func(*testing.T) {
			mounts, err := s.sn.Prepare(ctx, "committing", "")
			check(t, err)
			for i := range 20_000 {
				check(t, os.Symlink("x", filepath.Join(mounts[0].Source, fmt.Sprint(i))))
			}
			answer := background(func() error { return s.sn.Commit(ctx, "committed", "committing") })
			time.Sleep(20 * time.Millisecond)
			return func(t *testing.T) {
				err := <-answer
				_, there := s.sn.Stat(ctx, "committed")
				if (err == nil) != (there == nil) {
					t.Errorf("the Commit was answered with %v, and the layer is there: %v", err, there)
				}
				check(t, s.sn.Remove(ctx, "committed"))
				check(t, s.sn.Remove(ctx, "committing"))
			}
		}},
		{"content read by repair", func(t *testing.T) func(*testing.T) {
			answer := background(func() error { return s.repair(ctx, `{"deep": true}`) })
			time.Sleep(50 * time.Millisecond)
			return func(*testing.T) { <-answer }
		}},
		{"content digests", func(t *testing.T) func(*testing.T) {
			time.Sleep(17 * time.Second) // they begin after 15 s
			return func(*testing.T) {}
		}},
		{"verification after an unclean shutdown", func(t *testing.T) func(*testing.T) {
			check(t, s.daemon.Kill())
			check(t, kit.NewBoot())
			s.start(t)
			answer := background(func() error { _, err := s.sn.Stat(ctx, s.name); return err })
			return func(t *testing.T) { stopped(t, answer) }
		}},
		{"stat that waits for a healing", func(t *testing.T) func(*testing.T) {
			s.lose(t)
			answer := background(func() error { return s.refused(ctx) })
			s.healing(t)
			return func(t *testing.T) { stopped(t, answer) }
		}},
		{"prepare that waits for a healing", func(t *testing.T) func(*testing.T) {
			answer := background(func() error { _, err := s.sn.Prepare(ctx, "waiting", s.name); return err })
			s.healing(t)
			return func(t *testing.T) {
				stopped(t, answer)
				_, err := s.sn.Stat(ctx, s.name) // healed
				check(t, err)
				check(t, s.sn.Remove(ctx, "waiting"))
			}
		}},
		{"healing by repair", func(t *testing.T) func(*testing.T) {
			s.lose(t)
			answer := background(func() error { return s.repair(ctx, `{"apply": true}`) })
			s.healing(t)
			return func(t *testing.T) { <-answer }
		}},
		{"containerd that does not answer", func(t *testing.T) func(*testing.T) {
			_, err := s.sn.Stat(ctx, s.name) // healed
			check(t, err)
			check(t, os.Remove(s.blob))
			s.lose(t)
			t.Log(s.refused(ctx))
			select {
			case <-s.called:
			case <-time.After(20 * time.Second):
				t.Error("containerd was not called")
			}
			return func(*testing.T) {}
		}},
	} {
		t.Run(situation.name, func(t *testing.T) {
			end := situation.begin(t)
			began := time.Now()
			check(t, s.daemon.Stop())
			took := time.Since(began)
			t.Logf("stopped in %v", took.Round(time.Millisecond))
			if took > stopLimit {
				t.Errorf("stopped after %v, want %v at most", took, stopLimit)
			}
			check(t, kit.NewBoot())
			logged := len(must[string](t)(s.daemon.Log()))
			s.start(t)
			if log := must[string](t)(s.daemon.Log())[logged:]; !strings.Contains(log, `"clean":true`) && !strings.Contains(log, "clean=true") {
				t.Errorf("the next boot does not know of a clean stop:\n%s", log)
			}
			end(t)
		})
	}
}

// repair sends a request to admin.sock.
func (s *stopping) repair(ctx context.Context, body string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://admin/v1/repair", strings.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := kit.AdminClient(s.daemon.Address).Do(req)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// deepen makes a chain of directories of any depth.
func deepen(t *testing.T, dir string, depth int) {
	t.Helper()
	fd, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	check(t, err)
	for range depth {
		check(t, unix.Mkdirat(fd, "d", 0o755))
		next, err := unix.Openat(fd, "d", unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		check(t, errors.Join(err, unix.Close(fd)))
		fd = next
	}
	check(t, unix.Close(fd))
}

// TestSecondSignal: who does not want to wait sends the signal again.
func TestSecondSignal(t *testing.T) {
	s := newStopping(t)
	// A List to a client that does not read holds the stop for some seconds.
	label := snapshots.WithLabels(kit.Labels(128 << 10))
	for i := range 20 {
		_, err := s.sn.Prepare(t.Context(), fmt.Sprint("labelled-", i), "", label)
		check(t, err)
	}
	conn, err := s.daemon.Dial()
	check(t, err)
	defer conn.Close()
	_, err = snapshotsapi.NewSnapshotsClient(conn).List(t.Context(), &snapshotsapi.ListSnapshotsRequest{Snapshotter: "durable"})
	check(t, err)
	time.Sleep(300 * time.Millisecond)
	check(t, syscall.Kill(s.daemon.PID(), syscall.SIGTERM))
	time.Sleep(300 * time.Millisecond)
	if !s.daemon.Running() {
		t.Skip("it has stopped before the second signal")
	}
	check(t, syscall.Kill(s.daemon.PID(), syscall.SIGTERM))
	began := time.Now()
	code, err := s.daemon.Wait(time.Minute)
	check(t, err)
	if took := time.Since(began); code != 128+int(syscall.SIGTERM) || took > 3*time.Second {
		t.Errorf("ended with %d after %v, want %d at once", code, took, 128+int(syscall.SIGTERM))
	}
	s.start(t)
}
