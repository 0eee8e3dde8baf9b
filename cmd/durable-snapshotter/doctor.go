package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/durable-snapshotter/durable-snapshotter/internal/admin"
	"github.com/durable-snapshotter/durable-snapshotter/internal/doctor"
	"github.com/durable-snapshotter/durable-snapshotter/internal/imagecheck"
	"github.com/durable-snapshotter/durable-snapshotter/internal/sockets"
	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
)

// The answers of doctor, which are no failures of it.
var (
	errWarnings = errors.New("the node has warnings")
	errFailures = errors.New("the node has failures")
)

// examine prints what keeps this node from using the snapshotter, or weakens its promise. With
// --print-config it prints what a platform's files need, or one of them.
func examine(c *command) error {
	asJSON := c.flags.Bool("json", false, "")
	file := c.flags.String("containerd-config", "", "")
	platform := c.flags.String("print-config", "", "")
	rest, err := c.parse()
	if limit := min(1, len(*platform)); err == nil && len(rest) > limit {
		err = fmt.Errorf("unexpected argument %q: %w", rest[limit], errUsage)
	}
	if err != nil {
		return err
	}
	if *platform != "" {
		text, err := doctor.PlatformText(*platform, strings.Join(rest, ""))
		if errors.Is(err, doctor.ErrPlatform) {
			return fmt.Errorf("--print-config: %w: %w", err, errUsage)
		}
		if err == nil {
			_, err = fmt.Fprint(c.stdout, text)
		}
		return err
	}
	cfg, err := c.config()
	if err != nil {
		return fmt.Errorf("%w: configuration: %w", errFailures, err)
	}
	facts, err := doctor.Gather(c.ctx, doctor.Config{
		Root: cfg.Root, Address: cfg.Address, Admin: sockets.Admin(cfg.Address), ContentRoot: cfg.ContentRoot,
		Sources: cfg.snapshotter().Sources(), RepairImages: cfg.Images.Repair != imagecheck.Off,
		Containerd: cfg.Containerd.Address, Snapshotter: cfg.Containerd.Snapshotter, File: *file,
		Report: func(context.Context) (r snapshotter.Report, err error) {
			return r, c.request(cfg, admin.InspectPath, nil, &r)
		},
	})
	if err != nil {
		return err
	}
	found := doctor.Run(facts)
	if *asJSON {
		err = c.printJSON(found)
	} else {
		err = c.printFindings(found)
	}
	if err != nil {
		return err
	}
	switch doctor.Worst(found) {
	case doctor.Failure:
		return errFailures
	case doctor.Warning:
		return errWarnings
	}
	return nil
}

func (c *command) printFindings(found []doctor.Finding) error {
	for _, f := range found {
		if _, err := fmt.Fprintf(c.stdout, "%-8s %-18s %s\n", f.Level, f.Check, f.Text); err != nil {
			return err
		}
		if f.Cure != "" {
			fmt.Fprintf(c.stdout, "%8s cure: %s\n", "", f.Cure)
		}
	}
	return nil
}
