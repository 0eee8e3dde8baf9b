package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthapi "google.golang.org/grpc/health/grpc_health_v1"
)

// healthWithin bounds the verb health: a probe of a service manager must come to an end.
const healthWithin = 5 * time.Second

// errNotServing is the answer of a daemon whose file system does not accept writes.
var errNotServing = errors.New("the file system of the root does not accept writes")

// printHealth requests from a running daemon whether it serves, as grpc.health.v1 has it.
func printHealth(c *command) error {
	if err := c.parseOnly(); err != nil {
		return err
	}
	cfg, err := c.config()
	if err != nil {
		return err
	}
	conn, err := grpc.NewClient("unix://"+cfg.Address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fmt.Errorf("health: %w", err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(c.ctx, healthWithin)
	defer cancel()
	for _, service := range []string{"", mendingService} {
		r, err := healthapi.NewHealthClient(conn).Check(ctx, &healthapi.HealthCheckRequest{Service: service})
		if err != nil {
			return fmt.Errorf("health: no answer at %s: %w", cfg.Address, err)
		}
		switch serving := r.Status == healthapi.HealthCheckResponse_SERVING; {
		case service == "" && !serving:
			return errNotServing
		case !serving:
			_, err := fmt.Fprintln(c.stdout, "serving; mending is stopped: see durable-snapshotter check")
			return err
		}
	}
	_, err = fmt.Fprintln(c.stdout, "serving")
	return err
}
