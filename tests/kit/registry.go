package kit

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync/atomic"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem" // the driver named in the configuration below
	"github.com/sirupsen/logrus"
)

// Registry is the reference registry implementation, in process, on loopback.
type Registry struct {
	Host     string // host:port, the first part of an image name
	Dir      string // of the blobs
	server   *http.Server
	done     chan error
	requests atomic.Int64
	silent   atomic.Bool
}

// StartRegistry serves a registry that keeps its blobs under dir.
func StartRegistry(dir string) (*Registry, error) {
	config := &configuration.Configuration{
		Version: "0.1",
		Log:     configuration.Log{Level: "error", AccessLog: configuration.AccessLog{Disabled: true}},
		Storage: configuration.Storage{
			"filesystem":  configuration.Parameters{"rootdirectory": dir},
			"maintenance": configuration.Parameters{"uploadpurging": map[any]any{"enabled": false}},
		},
	}
	config.HTTP.Secret = "loopback"
	// The registry logs through the global logger, and a client that checks
	// whether a blob is there already would appear as an error on every push.
	logrus.SetLevel(logrus.FatalLevel)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	r := &Registry{Host: listener.Addr().String(), Dir: dir, done: make(chan error, 1)}
	app := handlers.NewApp(context.Background(), config)
	r.server = &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.requests.Add(1)
		if r.silent.Load() {
			panic(http.ErrAbortHandler) // net/http closes the connection
		}
		app.ServeHTTP(w, req)
	})}
	go func() { r.done <- r.server.Serve(listener) }()
	return r, nil
}

// Ref is the name of an image in this registry.
func (r *Registry) Ref(name string) string { return r.Host + "/" + name + ":latest" }

// Requests is how many requests there have been, answered or not.
func (r *Registry) Requests() int64 { return r.requests.Load() }

// Silence makes the registry as good as gone, and still count: from now on it
// closes each connection without a byte at the first request.
func (r *Registry) Silence() { r.silent.Store(true) }

// Close stops serving. The blobs stay.
func (r *Registry) Close() error {
	err := r.server.Close()
	if served := <-r.done; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, served)
	}
	return err
}

// WithRegistry runs f with a registry that keeps its blobs below os.TempDir, for
// the tests of a whole package. Call it within [Main].
func WithRegistry(f func(*Registry) int) int {
	r, err := StartRegistry(filepath.Join(os.TempDir(), "registry"))
	if err != nil {
		return report(1, err)
	}
	code := f(r)
	return report(code, r.Close())
}
