package main

import (
	"errors"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// cutPower stops the disks and then everything that runs. In this order: a
// daemon that is still alive must not find time to write.
func cutPower(halves []*half) (killed int, err error) {
	for _, h := range halves {
		if err := h.disk.Shutdown(); err != nil {
			return 0, err
		}
	}
	return kit.KillAll()
}

// clearAway leaves nothing behind, whatever state the halves are in. What it
// forgets dies with the kit's namespace.
func clearAway(halves []*half) error {
	_, err := kit.KillAll()
	for _, h := range halves {
		if h.disk != nil {
			err = errors.Join(err, kit.UnmountBelow(h.runDir()), h.disk.Close())
		}
	}
	return err
}
