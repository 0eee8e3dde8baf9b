package main

import (
	"fmt"

	"github.com/pelletier/go-toml/v2"
)

func printConfig(c *command) error {
	args, err := c.parse()
	if err != nil {
		return err
	}
	cfg := Default()
	switch {
	case len(args) == 0:
		if cfg, err = c.config(); err != nil {
			return err
		}
	case len(args) != 1 || args[0] != "default":
		return fmt.Errorf("unexpected argument %q: %w", args[0], errUsage)
	}
	return toml.NewEncoder(c.stdout).Encode(cfg)
}
