package repull

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/types/known/emptypb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Plugin is one of the plugins of a running containerd.
type Plugin struct {
	Type, ID     string
	Exports      map[string]string
	Capabilities []string
	Failed       string // why it did not start, "" when it did
}

// Plugins lists the plugins that containerd has loaded, or tried to; of the given types, or all.
func (c *Containerd) Plugins(ctx context.Context, types ...string) (all []Plugin, err error) {
	var filters []string
	for _, t := range types {
		filters = append(filters, "type=="+t)
	}
	r, err := c.inspect.Plugins(ctx, &introspectionapi.PluginsRequest{Filters: filters})
	if err != nil {
		return nil, fmt.Errorf("list the plugins of containerd: %w", errgrpc.ToNative(err))
	}
	for _, p := range r.Plugins {
		one := Plugin{Type: p.Type, ID: p.ID, Exports: p.Exports, Capabilities: p.Capabilities}
		if p.InitErr != nil {
			one.Failed = cmp.Or(p.InitErr.Message, "it did not start")
		}
		all = append(all, one)
	}
	return all, nil
}

// Version is the release of containerd, as "v2.4.2".
func (c *Containerd) Version(ctx context.Context) (string, error) {
	r, err := versionapi.NewVersionClient(c.conn).Version(ctx, &emptypb.Empty{})
	if err != nil {
		return "", fmt.Errorf("get the version of containerd: %w", errgrpc.ToNative(err))
	}
	return r.Version, nil
}

// CRI is what the CRI plugin does, whatever its files have.
type CRI struct {
	// Snapshotter is the one of pods, "" when it is known only by its file system.
	Snapshotter string
	ImageFs     string            // mount point of the file system of the images, as the kubelet gets it
	Runtimes    map[string]string // snapshotters of their own that runtimes have
}

// ErrNoCRI means that containerd runs without a CRI plugin.
var ErrNoCRI = errors.New("containerd runs without the CRI plugin")

// CRI requests from the CRI plugin what it does. The configuration that it reports has the
// snapshotter until 1.7; later, the place of the images shows it.
func (c *Containerd) CRI(ctx context.Context) (cri CRI, err error) {
	status, err := runtimeapi.NewRuntimeServiceClient(c.conn).Status(ctx, &runtimeapi.StatusRequest{Verbose: true})
	if err = errgrpc.ToNative(err); errdefs.IsNotImplemented(err) {
		return cri, ErrNoCRI
	}
	if err != nil {
		return cri, fmt.Errorf("get the status of the CRI plugin: %w", err)
	}
	var config struct {
		Containerd struct {
			Snapshotter string `json:"snapshotter"`
			Runtimes    map[string]struct {
				Snapshotter string `json:"snapshotter"`
			} `json:"runtimes"`
		} `json:"containerd"`
	}
	if err := json.Unmarshal([]byte(status.Info["config"]), &config); err != nil {
		return cri, fmt.Errorf("status of the CRI plugin: %w", err)
	}
	cri.Snapshotter, cri.Runtimes = config.Containerd.Snapshotter, map[string]string{}
	for name, r := range config.Containerd.Runtimes {
		if r.Snapshotter != "" {
			cri.Runtimes[name] = r.Snapshotter
		}
	}
	fs, err := runtimeapi.NewImageServiceClient(c.conn).ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
	if err != nil {
		return cri, fmt.Errorf("get the file system of the images: %w", errgrpc.ToNative(err))
	}
	// The first is that of the default snapshotter.
	if len(fs.ImageFilesystems) > 0 {
		cri.ImageFs = fs.ImageFilesystems[0].GetFsId().GetMountpoint()
	}
	return cri, nil
}

// Of returns the snapshotter of pods: by its name, or the one among plugins with the file system
// of the images. It is "" when nothing shows it.
func (cri CRI) Of(plugins []Plugin) string {
	if cri.Snapshotter != "" || cri.ImageFs == "" {
		return cri.Snapshotter
	}
	for _, p := range plugins {
		if p.Type == snapshotPlugin && p.Exports["root"] != "" && filepath.Clean(p.Exports["root"]) == filepath.Clean(cri.ImageFs) {
			return p.ID
		}
	}
	// Without exports, the CRI plugin makes a path up.
	name, ok := strings.CutPrefix(filepath.Base(cri.ImageFs), snapshotPlugin+".")
	if !ok {
		return ""
	}
	return name
}
