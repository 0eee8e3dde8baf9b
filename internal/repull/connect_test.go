package repull

import (
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
)

// TestConnectsSoonAfterALongOutage: the pauses between attempts do not grow with the
// time that containerd is down. A listener sees them.
func TestConnectsSoonAfterALongOutage(t *testing.T) {
	t.Parallel()
	socket := t.TempDir() + "/c.sock"
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	attempts := make(chan time.Time, 100)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			attempts <- time.Now()
			conn.Close()
		}
	}()
	c, err := Connect(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	last, longest := time.Time{}, time.Duration(0)
	for end := time.After(25 * time.Second); ; {
		c.conn.Connect() // as a call does
		select {
		case now := <-attempts:
			if !last.IsZero() {
				longest = max(longest, now.Sub(last))
			}
			last = now
		case <-time.After(50 * time.Millisecond):
		case <-end:
			// With grpc's own configuration it is 6.5 s by now, and 120 s in the end.
			if longest = max(longest, time.Since(last)); longest > 5500*time.Millisecond {
				t.Errorf("%v passed between two attempts", longest)
			}
			return
		}
	}
}

// slowListener hands out each connection some time after it was made, as a busy machine does.
type slowListener struct{ net.Listener }

func (l slowListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	time.Sleep(2 * time.Second)
	return conn, err
}

// TestConnectsToBusyContainerd: a containerd that is slow to answer the beginning of a
// connection is not taken for one that is down.
func TestConnectsToBusyContainerd(t *testing.T) {
	t.Parallel()
	socket := t.TempDir() + "/c.sock"
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	go func() { _ = server.Serve(slowListener{l}) }()
	defer server.Stop()
	c, err := Connect(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	// The server has no services: that it answers so shows that the call has arrived.
	if _, err := c.listNamespaces(t.Context()); !errdefs.IsNotImplemented(err) {
		t.Errorf("a call of a busy containerd: %v", err)
	}
}

func TestPlace(t *testing.T) {
	for name, want := range map[string]string{
		"k8s.io/12/sha256:ab": "k8s.io sha256:ab true", "a/1/b/c": "a b/c true",
		"a/x/b": "a b false", "by hand": "  false", "a/b": "  false",
	} {
		ns, key, ok := Snapshot{Name: name}.Place()
		if got := fmt.Sprint(ns, " ", key, " ", ok); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
}

// TestErrorsNameTheCure, and are no NotFound, upon which containerd would act.
func TestErrorsNameTheCure(t *testing.T) {
	for _, err := range []error{&GoodBlobError{Configured: t.TempDir(), Root: "/var/lib/x"}, &UnknownBlobError{}} {
		if !errdefs.IsFailedPrecondition(err) || errdefs.IsNotFound(err) {
			t.Errorf("%v: of the wrong kind", err)
		}
	}
}
