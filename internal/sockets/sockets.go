// Package sockets makes the unix sockets of the daemon, or takes those that a service manager has
// made, and gives them up without refusing a client.
package sockets

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// Listeners are the sockets that a service manager has made and passed on, by their paths. They
// outlive the daemon: a client that connects while it is restarted waits, and is not refused.
type Listeners map[string]net.Listener

// Inherited returns the sockets that systemd has passed (sd_listen_fds(3)).
func Inherited() (Listeners, error) {
	all, err := activation.Listeners()
	if err != nil {
		return nil, fmt.Errorf("sockets of the service manager: %w", err)
	}
	given := Listeners{}
	for _, l := range all {
		if l != nil {
			given[l.Addr().String()] = l
		}
	}
	return given, nil
}

// Check refuses paths that another daemon serves.
func (g Listeners) Check(paths ...string) error {
	for _, path := range paths {
		if g[path] != nil {
			continue
		}
		if err := checkSocket(path); err != nil {
			return err
		}
	}
	return nil
}

// Unused are those that the configuration does not name.
func (g Listeners) Unused(paths ...string) (left []string) {
	for path := range g {
		if !slices.Contains(paths, path) {
			left = append(left, path)
		}
	}
	return left
}

// Listen returns the socket of a path, which it makes when it was not passed.
func (g Listeners) Listen(ctx context.Context, path string) (net.Listener, error) {
	if l := g[path]; l != nil {
		return l, nil
	}
	return Listen(ctx, path)
}

// Admin is the socket for operators and monitoring, beside containerd's.
func Admin(address string) string { return filepath.Join(filepath.Dir(address), "admin.sock") }

// checkSocket refuses an address that another process serves, or that is no socket. A
// socket that refuses connections is stale: its daemon was killed.
func checkSocket(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode()&os.ModeSocket == 0 {
		return fmt.Errorf("address %s: exists and is not a socket", path)
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		return errors.Join(fmt.Errorf("address %s: another daemon answers there", path), conn.Close())
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("address %s: %w", path, err)
	}
	return nil
}

// Listen makes the socket, mode 0600, in a directory that is made 0700 when it
// is missing, in the place of a stale one.
func Listen(ctx context.Context, path string) (net.Listener, error) {
	if err := checkSocket(path); err != nil {
		return nil, err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	// The mode is set before bind(2) gives the socket a name, so that there is
	// no instant at which others could connect.
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(cerr, err)
	}}
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("address %s: %w", path, err)
	}
	return l, nil
}

// Greeter is a listener that stops accepting without refusing a client. A server that is
// stopped closes what it has accepted and not yet greeted (grpc v1.83.2 server.go:983), while a
// client at a socket of systemd's from which no process accepts waits for the next daemon.
type Greeter struct {
	net.Listener
	greeting sync.WaitGroup // connections without a byte of the server
	once     sync.Once
	ended    chan struct{} // closed when Accept accepts no more
}

// Greet returns a Greeter of a listener.
func Greet(l net.Listener) *Greeter { return &Greeter{Listener: l, ended: make(chan struct{})} }

// Accept must be called by one goroutine.
func (g *Greeter) Accept() (net.Conn, error) {
	c, err := g.Listener.Accept()
	if err != nil {
		g.once.Do(func() { close(g.ended) })
		return nil, err
	}
	g.greeting.Add(1)
	return &greeted{Conn: c, done: sync.OnceFunc(g.greeting.Done)}, nil
}

// End makes Accept fail, and waits until each client has been greeted, for the limit at most.
func (g *Greeter) End(limit time.Duration) {
	l, ok := g.Listener.(interface{ SetDeadline(time.Time) error })
	if !ok || l.SetDeadline(time.Now()) != nil {
		return
	}
	over := time.After(limit)
	select {
	case <-g.ended:
	case <-over:
		return
	}
	all := make(chan struct{})
	go func() { g.greeting.Wait(); close(all) }()
	select {
	case <-all:
	case <-over:
	}
}

// greeted is a connection that the server has greeted once it has written to it.
type greeted struct {
	net.Conn
	done func()
}

func (c *greeted) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.done()
	return n, err
}

func (c *greeted) Close() error {
	c.done()
	return c.Conn.Close()
}
