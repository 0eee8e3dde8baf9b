package oracle

import (
	"errors"
	"os"
	"path/filepath"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
)

// records reads what durable-snapshotter has written beside each layer, before
// recovery can put it right: repair --rebuild has nothing else to go by when the
// database is lost, too.
func (k *examination) records() {
	k.Recorded = map[string]bool{}
	for name := range k.Record.Damaged {
		k.Recorded[name] = true // it may be gone with the layer
	}
	paths, err := filepath.Glob(filepath.Join(k.root, "snapshots", "*", "record"))
	if err != nil {
		k.flaw("records: %v", err)
	}
	for _, path := range paths {
		var r struct {
			Kind string `json:"kind"`
			Name string `json:"name"`
		}
		data, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err == nil {
			err = layout.Decode(data, &r)
		}
		// A record that is not whole may be one of which nothing was promised:
		// Judge knows by the name that is missing.
		if err == nil && r.Kind == "committed" {
			k.Recorded[r.Name] = true
		}
	}
}
