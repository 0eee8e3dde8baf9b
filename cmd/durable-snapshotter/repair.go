package main

import (
	"encoding/json"
	"fmt"

	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
)

// repair changes what is on disk, and only what its flag names.
func repair(c *command) error {
	rebuild := c.flags.Bool("rebuild", false, "")
	asJSON := c.flags.Bool("json", false, "")
	if err := c.parseOnly(); err != nil {
		return err
	}
	if !*rebuild {
		return fmt.Errorf("repair: say what: --rebuild makes a new metadata.db: %w", errUsage)
	}
	cfg, err := c.config()
	if err != nil {
		return err
	}
	r, err := snapshotter.Rebuild(c.ctx, cfg.Root)
	if err != nil {
		return err
	}
	if *asJSON {
		return json.NewEncoder(c.stdout).Encode(r)
	}
	fmt.Fprintf(c.stdout, "rebuilt: %d committed, %d active, %d views\n", r.Committed, r.Active, r.Views)
	if r.OldFile != "" {
		fmt.Fprintf(c.stdout, "kept: %s\n", r.OldFile)
	}
	for _, s := range r.SetAside {
		fmt.Fprintf(c.stdout, "set aside: %s: %q: %s\n", s.Directory, s.Name, s.Reason)
	}
	return nil
}
