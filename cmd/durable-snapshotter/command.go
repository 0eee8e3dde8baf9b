package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
)

// command is one call of the program.
type command struct {
	ctx     context.Context
	stdout  io.Writer
	stderr  io.Writer
	flags   *flag.FlagSet
	args    []string // what follows the verb
	path    string   // --config
	setting Config   // the flags that override the file
}

// errUsage is wrapped by errors in the command line.
var errUsage = errors.New("see durable-snapshotter help")

// parse reads the flags of a verb; extra ones are defined on c.flags before. It
// returns what is left over.
func (c *command) parse() ([]string, error) {
	err := c.flags.Parse(c.args)
	if errors.Is(err, flag.ErrHelp) {
		fmt.Fprint(c.stdout, usage)
		return nil, err
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errUsage)
	}
	return c.flags.Args(), nil
}

// parseOnly is parse for a verb that takes no arguments.
func (c *command) parseOnly() error {
	rest, err := c.parse()
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("unexpected argument %q: %w", rest[0], errUsage)
	}
	return err
}

// config reads the file, applies the flags and validates the result.
func (c *command) config() (Config, error) {
	cfg := Default()
	path := c.path
	if path == "" {
		path = defaultConfigPath
	}
	data, err := os.ReadFile(path)
	switch {
	case err == nil:
		if err := decode(path, data, &cfg); err != nil {
			return cfg, err
		}
	case errors.Is(err, os.ErrNotExist) && c.path == "":
	default:
		return cfg, fmt.Errorf("configuration: %w", err)
	}
	for _, o := range []struct {
		to   *string
		from string
	}{{&cfg.Root, c.setting.Root}, {&cfg.Address, c.setting.Address}, {&cfg.LogLevel, c.setting.LogLevel}} {
		if o.from != "" {
			*o.to = o.from
		}
	}
	cfg.Address = strings.TrimPrefix(cfg.Address, "unix://")
	return cfg, cfg.Validate()
}
