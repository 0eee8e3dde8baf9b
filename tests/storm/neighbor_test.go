package storm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
)

// actNeighbor is a program beside the daemon that writes to the same file system: what it has not
// synced, the daemon's next sync writes, too.
func (s *storm) actNeighbor(_ context.Context, rng *rand.Rand) (string, error) {
	s.node.onDisk.RLock() // a power cut unmounts the disk
	defer s.node.onDisk.RUnlock()
	size, sync := 1<<20+rng.IntN(15<<20), rng.IntN(2) == 0
	f, err := os.CreateTemp(s.node.Path(), "neighbor")
	if err != nil {
		return fmt.Sprint("fails: ", err), nil // the file system may be full, or was shut down
	}
	_, err = io.CopyN(f, zeros{}, int64(size))
	if err == nil && sync {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close(), os.Remove(f.Name()))
	return fmt.Sprintf("%d KiB, synced %v: %v", size>>10, sync, err), nil
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
