package storm

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
)

// sources are where the daemon can have good bytes from, beside containerd's content store.
// What the storm does to them disturbs no pull: they are the daemon's own way.
type sources struct {
	archives string      // directory that the daemon looks into
	kept     string      // directory of all archives, to be linked into it
	hosts    string      // file by which containerd reaches the registry for the daemon
	dark     atomic.Bool // it cannot
	turn     sync.Mutex  // one lane at a time changes dark and the file
}

// sourcesConfig is the part of the daemon's configuration that is about its sources, and about
// the images after a power cut.
func sourcesConfig(dir string) string {
	return fmt.Sprintf("[heal]\narchives = ['%s']\nregistry = true\nhosts = '%s'\n[images]\nrepair = 'full'\n", filepath.Join(dir, "archives"), filepath.Join(dir, "hosts"))
}

// makeSources makes an archive of each image, of which the daemon has none yet, and opens the
// way to the registry.
func (s *storm) makeSources(dir string) error {
	o := &s.sources
	o.archives, o.kept = filepath.Join(dir, "archives"), filepath.Join(dir, "kept")
	o.hosts = filepath.Join(dir, "hosts", s.registry.Host, "hosts.toml")
	for _, d := range []string{o.archives, o.kept, filepath.Dir(o.hosts)} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	for _, img := range s.images {
		if err := s.registry.WriteArchive(filepath.Join(o.kept, img.name+".tar"), img.Pushed); err != nil {
			return err
		}
	}
	return s.writeHosts(s.registry.Host)
}

// writeHosts makes containerd look for the registry elsewhere when it fetches for the daemon.
func (s *storm) writeHosts(host string) error {
	part := s.sources.hosts + ".part"
	if err := os.WriteFile(part, fmt.Appendf(nil, "server = 'http://%s'\n", host), 0o644); err != nil {
		return err
	}
	return os.Rename(part, s.sources.hosts)
}

// actRegistry takes the daemon's way to the registry away, or gives it back.
func (s *storm) actRegistry(context.Context, *rand.Rand) (string, error) {
	s.sources.turn.Lock()
	defer s.sources.turn.Unlock()
	dark := !s.sources.dark.Load()
	s.sources.dark.Store(dark)
	host := s.registry.Host
	if dark {
		host = "127.0.0.1:1"
	}
	return fmt.Sprintf("fetches of the daemon go to %s", host), s.writeHosts(host)
}

// actArchive gives the daemon the archive of an image, or takes it away.
func (s *storm) actArchive(_ context.Context, rng *rand.Rand) (string, error) {
	name := s.images[rng.IntN(len(s.images))].name + ".tar"
	at := filepath.Join(s.sources.archives, name)
	err := os.Link(filepath.Join(s.sources.kept, name), at)
	if errors.Is(err, os.ErrExist) {
		if err = os.Remove(at); errors.Is(err, os.ErrNotExist) {
			err = nil // another lane was quicker
		}
		return name + " is gone", err
	}
	return name + " is there", err
}

// actFetch fetches an image without unpacking it, as an operator does who wants its blobs back.
func (s *storm) actFetch(ctx context.Context, rng *rand.Rand) (string, error) {
	namespace, img := where(rng), s.images[rng.IntN(len(s.images))]
	_, err := s.node.Containerd.Ctr(ctx, "--namespace", namespace, "content", "fetch", "--plain-http", img.Ref)
	return fmt.Sprintf("%s %s: %v", namespace, img.name, err), nil
}
