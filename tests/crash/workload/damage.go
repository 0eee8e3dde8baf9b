package workload

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// wound is one way to damage a layer. fs is its tree; its snapshot directory is
// above it.
type wound struct {
	chain, layer int
	what         string
	inflict      func(fs string) error
}

// wounds that are seen without reading content.
var wounds = []wound{
	{asked, 0, "a file is empty", func(fs string) error { return os.Truncate(filepath.Join(fs, "data/large"), 0) }},
	{asked, 1, "a file is missing", func(fs string) error { return os.Remove(filepath.Join(fs, "layer1/file1")) }},
	{asked, 2, "the tree is missing", os.RemoveAll},
	{removed, 1, "the snapshot directory is missing", func(fs string) error { return os.RemoveAll(filepath.Dir(fs)) }},
	{removed, 2, "a mode has changed, and there is a file too many", func(fs string) error {
		return errors.Join(os.Chmod(filepath.Join(fs, "layer2"), 0o700), os.WriteFile(filepath.Join(fs, "etc/extra"), nil, 0o644))
	}},
	{hopeless, 1, "a directory is missing", func(fs string) error { return os.RemoveAll(filepath.Join(fs, "layer1")) }},
}

// Hurt damages layers of a plan for healing by hand, and notes it in the record.
// dirs has the trees of all layers. With everything, nothing is left of any.
func (r *Record) Hurt(p *Plan, dirs map[string]string, everything bool) error {
	if everything {
		for name, fs := range dirs {
			r.Damaged[name] = "snapshots/ is missing"
			if err := os.RemoveAll(filepath.Dir(filepath.Dir(fs))); err != nil {
				return fmt.Errorf("damage layers: %w", err)
			}
		}
		return nil
	}
	for _, w := range wounds {
		name := p.Chains[w.chain].Layers[w.layer].Name
		r.Damaged[name] = w.what
		if err := w.inflict(dirs[name]); err != nil {
			return fmt.Errorf("damage layer %s: %s: %w", name, w.what, err)
		}
	}
	return nil
}
