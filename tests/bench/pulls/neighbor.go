package pulls

import (
	"context"
	"errors"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sys/unix"
)

// neighborFile is how much of a file the neighbor writes to, from its beginning again and again.
const neighborFile = 1 << 30

// Neighbor is a process that writes to the pages of a file.
type Neighbor struct{ child *child }

// StartNeighbor starts one with a rate, in bytes a second. The program must call Init.
func StartNeighbor(file string, rate int64) (*Neighbor, error) {
	c, err := startChild("neighbor", file, strconv.FormatInt(rate, 10))
	return &Neighbor{c}, err
}

// End ends it. The result is what it has written in bytes a second.
func (n *Neighbor) End() (float64, error) {
	var found neighborFound
	err := n.child.end(&found)
	return found.Rate, err
}

// neighborFound is what the neighbor has done.
type neighborFound struct{ Rate float64 } // bytes a second

// dirty writes to the pages of a file at a steady rate: args are the file, and bytes a second. A
// rate that the kernel does not allow, because the disk cannot keep up, is not made up for.
func dirty(args []string) error {
	rate, err := strconv.ParseFloat(args[1], 64)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(args[0], os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	const step = 1 << 20
	page := make([]byte, step)
	ended, start := ready(), time.Now()
	written, due := int64(0), start
	for at := int64(0); ; at = (at + step) % neighborFile {
		select {
		case <-ended:
			return found(neighborFound{float64(written) / time.Since(start).Seconds()})
		case <-time.After(time.Until(due)):
		}
		if _, err := f.WriteAt(page, at); err != nil {
			return err
		}
		written += step
		due = due.Add(time.Duration(step / rate * float64(time.Second)))
		if late := time.Now().Add(-100 * time.Millisecond); due.Before(late) {
			due = late
		}
	}
}

// Probe is a process that writes 4 KiB and syncs them every 5 ms, as a database does.
type Probe struct{ child *child }

// StartProbe starts one. The program must call Init.
func StartProbe(file string) (*Probe, error) {
	c, err := startChild("probe", file)
	return &Probe{c}, err
}

// End ends it. The result is how long the syncs took.
func (p *Probe) End() (*Latency, error) {
	var found probeFound
	err := p.child.end(&found)
	return found.Fdatasync, err
}

// probeFound is what a probe has measured.
type probeFound struct{ Fdatasync, Lease *Latency }

const (
	fdatasyncEvery = 5 * time.Millisecond
	leaseEvery     = 50 * time.Millisecond
)

// probe measures what others have of the disk and, if there is one, of containerd: args are a file, and
// the socket of containerd and a namespace.
func probe(args []string) (err error) {
	f, err := os.OpenFile(args[0], os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	var cl *client.Client
	ctx := context.Background()
	if len(args) > 1 {
		if cl, err = client.New(args[1], client.WithTimeout(30*time.Second)); err != nil {
			return err
		}
		defer cl.Close()
		ctx = namespaces.WithNamespace(ctx, args[2])
	}
	ended := ready()
	var syncs, leased []float64
	var syncErr, leaseErr error
	var running sync.WaitGroup
	running.Go(func() {
		page := make([]byte, 4096)
		syncs, syncErr = every(fdatasyncEvery, ended, func() error {
			_, err := f.WriteAt(page, 0)
			return errors.Join(err, unix.Fdatasync(int(f.Fd())))
		})
	})
	if cl != nil {
		running.Go(func() {
			leased, leaseErr = every(leaseEvery, ended, func() error {
				l, err := cl.LeasesService().Create(ctx, leases.WithRandomID())
				if err != nil {
					return err
				}
				return cl.LeasesService().Delete(ctx, l)
			})
		})
	}
	running.Wait()
	if err := errors.Join(syncErr, leaseErr); err != nil {
		return err
	}
	return found(probeFound{LatencyOf(syncs), LatencyOf(leased)})
}

// every does something at a steady pace, and returns how long each took, in seconds.
func every(pace time.Duration, ended <-chan struct{}, do func() error) (took []float64, err error) {
	tick := time.NewTicker(pace)
	defer tick.Stop()
	for {
		select {
		case <-ended:
			return took, nil
		case <-tick.C:
		}
		start := time.Now()
		if err := do(); err != nil {
			return nil, err
		}
		took = append(took, time.Since(start).Seconds())
	}
}
