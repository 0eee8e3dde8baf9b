package main

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/imagecheck"
	"github.com/durable-snapshotter/durable-snapshotter/internal/notify"
	"github.com/durable-snapshotter/durable-snapshotter/internal/scrub"
	"github.com/durable-snapshotter/durable-snapshotter/internal/sockets"
	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

const defaultConfigPath = "/etc/durable-snapshotter/config.toml"

// Config is the configuration file. The comments are printed with it: they are
// the documentation of the keys.
type Config struct {
	Root        string            `toml:"root" comment:"Where snapshots and metadata.db live: an absolute path on a local ext4, xfs or btrfs."`
	Address     string            `toml:"address" comment:"Unix socket that containerd connects to. admin.sock is made beside it."`
	ContentRoot string            `toml:"content_root" comment:"The content store of containerd. A damaged layer is extracted again out of its blob there.\nk3s: /var/lib/rancher/k3s/agent/containerd/io.containerd.content.v1.content\nRKE2: /var/lib/rancher/rke2/agent/containerd/io.containerd.content.v1.content\nEmpty: damaged layers are refused and not healed."`
	LogLevel    string            `toml:"log_level" comment:"trace, debug, info, warn or error."`
	Snapshotter SnapshotterConfig `toml:"snapshotter" comment:"The keys of containerd's overlayfs plugin, with the same meaning."`
	Diff        DiffConfig        `toml:"diff" comment:"How layers are extracted, where containerd's configuration names this differ."`
	Journal     JournalConfig     `toml:"journal"`
	Heal        HealConfig        `toml:"heal" comment:"Where a damaged layer comes from when containerd's content store has no good blob of it, in this order."`
	Images      ImagesConfig      `toml:"images" comment:"What is done about the images of containerd after a power cut, or another unclean shutdown of the machine."`
	Scrub       ScrubConfig       `toml:"scrub" comment:"Verification of layers in the background, at idle I/O priority."`
	Admin       AdminConfig       `toml:"admin" comment:"HTTP on admin.sock, beside the socket of containerd: health, metrics, and what is on record."`
	Containerd  ContainerdConfig  `toml:"containerd" comment:"How containerd is notified when a layer is healed, or cannot be."`
}

// SnapshotterConfig mirrors the configuration of containerd's overlayfs plugin.
type SnapshotterConfig struct {
	UpperdirLabel bool     `toml:"upperdir_label" comment:"Add the label containerd.io/snapshot/overlay.upperdir to every snapshot."`
	SyncRemove    bool     `toml:"sync_remove" comment:"Delete directories in Remove, not in the Cleanup that follows it."`
	SlowChown     bool     `toml:"slow_chown" comment:"Allow containerd to chown a whole tree where the kernel cannot map owners in a mount.\nTakes effect when the capability \"only-remap-ids\" is left out of containerd's proxy_plugins entry."`
	MountOptions  []string `toml:"mount_options" comment:"Options for overlay mounts, one per item. Not used for bind mounts."`
}

// DiffConfig is how layers are extracted.
type DiffConfig struct {
	Enabled      bool   `toml:"enabled" comment:"Extract the layers of this snapshotter in the daemon, and make them durable before their Commit.\nfalse: containerd's own differ does it, and Commit syncs. Layers of others, and encrypted ones, are always handed to it."`
	Decompressor string `toml:"decompressor" comment:"auto: in the daemon, which takes no longer than another program. igzip: gzip by that program, of the package isal, where it is installed. internal: never another program."`
	Sync         string `toml:"sync" comment:"How an extracted layer is made durable before its Commit, on ext4 and xfs.\nauto: while other processes have much to be written to disks, only the files of the layer are synced, else the file system.\nsyncfs: always the file system. files: always only the files."`
}

// JournalConfig bounds the commit journal.
type JournalConfig struct {
	History uint64 `toml:"history" comment:"Removed snapshots whose commit entries are kept. Those of existing snapshots always are."`
}

// HealConfig is where layers come from.
type HealConfig struct {
	Archives []string `toml:"archives" comment:"Image archives, of ctr image export or docker save, plain or compressed with gzip, zstd or bzip2:\nfiles, and directories of them. k3s: /var/lib/rancher/k3s/agent/images"`
	Registry bool     `toml:"registry" comment:"Let containerd fetch the blob again, without credentials, before its image is dropped."`
	Hosts    string   `toml:"hosts" comment:"With registry: the directory of containerd's configuration of registries.\nk3s: /var/lib/rancher/k3s/agent/etc/containerd/certs.d"`
}

// ImagesConfig is what is done about images after an unclean shutdown.
type ImagesConfig struct {
	Repair string `toml:"repair" comment:"off: images are not checked.\nheal: each image is checked, its damaged layers are healed in place, and the verdicts are logged.\nfetch: also, blobs that are not what their digests require are deleted, and fetched again if registry allows it.\nfull: also, what is missing of an image is unpacked again; with drop_images, images that cannot be repaired are dropped."`
}

// ScrubConfig is when layers are verified.
type ScrubConfig struct {
	Interval duration `toml:"interval" comment:"Time from one verification of all layers to the next, as 168h. 0s: none. After an unclean shutdown there is one anyway."`
	Depth    string   `toml:"depth" comment:"metadata: names, sizes, owners, attributes and so on. content: every byte, too."`
	Rate     int64    `toml:"rate" comment:"Bytes of content that are read per second at most. 0: no limit."`
}

// AdminConfig is what is served to operators and monitoring.
type AdminConfig struct {
	MetricsAddress string `toml:"metrics_address" comment:"Serve /metrics on TCP, too, as 127.0.0.1:9273. Empty: only on admin.sock. There is no authentication."`
	Pprof          bool   `toml:"pprof" comment:"Serve /debug/pprof/ on admin.sock, for profiles of the daemon."`
}

// ContainerdConfig is how to reach containerd.
type ContainerdConfig struct {
	Address     string `toml:"address" comment:"Its socket. k3s: /run/k3s/containerd/containerd.sock. Empty: containerd is not notified."`
	Snapshotter string `toml:"snapshotter" comment:"The name of this snapshotter in containerd's proxy_plugins."`
	DropImages  bool   `toml:"drop_images" comment:"Let containerd forget images of which a layer is damaged and its blob is missing or corrupt, so that the next pull is clean.\nContainers that stand on them keep them."`
}

// duration is written as time.ParseDuration reads it.
type duration time.Duration

func (d duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

func (d *duration) UnmarshalText(text []byte) error {
	parsed, err := time.ParseDuration(string(text))
	*d = duration(parsed)
	return err
}

// Default returns the configuration without a file.
func Default() Config {
	return Config{
		Root:        "/var/lib/durable-snapshotter",
		Address:     "/run/durable-snapshotter/durable-snapshotter.sock",
		ContentRoot: "/var/lib/containerd/io.containerd.content.v1.content",
		LogLevel:    "info",
		Snapshotter: SnapshotterConfig{MountOptions: []string{}},
		Diff:        DiffConfig{Enabled: true, Decompressor: "auto", Sync: string(fsync.Auto)},
		Journal:     JournalConfig{History: 1000},
		Heal:        HealConfig{Archives: []string{}, Registry: true, Hosts: "/etc/containerd/certs.d"},
		Images:      ImagesConfig{Repair: imagecheck.Fetch},
		Scrub:       ScrubConfig{Depth: "metadata", Rate: 32 << 20},
		Containerd:  ContainerdConfig{Address: "/run/containerd/containerd.sock", Snapshotter: "durable", DropImages: true},
	}
}

// decode is strict: an unknown key is an error that names the line, because a
// misspelled key would otherwise be a setting without effect.
func decode(path string, data []byte, cfg *Config) error {
	err := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields().Decode(cfg)
	var unknown *toml.StrictMissingError
	var syntax *toml.DecodeError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &unknown):
		var all []error
		for _, e := range unknown.Errors {
			row, _ := e.Position()
			all = append(all, fmt.Errorf("%s:%d: unknown key %q", path, row, strings.Join(e.Key(), ".")))
		}
		return errors.Join(all...)
	case errors.As(err, &syntax):
		row, column := syntax.Position()
		return fmt.Errorf("%s:%d:%d: %w", path, row, column, syntax)
	default:
		return fmt.Errorf("%s: %w", path, err)
	}
}

// Validate names the first key whose value cannot be used.
func (c Config) Validate() error {
	if !filepath.IsAbs(c.Root) {
		return fmt.Errorf("root %q: not an absolute path", c.Root)
	}
	if !filepath.IsAbs(c.Address) {
		return fmt.Errorf("address %q: not an absolute path", c.Address)
	}
	if c.ContentRoot != "" && !filepath.IsAbs(c.ContentRoot) {
		return fmt.Errorf("content_root %q: not an absolute path", c.ContentRoot)
	}
	if c.Heal.Hosts != "" && !filepath.IsAbs(c.Heal.Hosts) {
		return fmt.Errorf("heal.hosts %q: not an absolute path", c.Heal.Hosts)
	}
	for _, path := range c.Heal.Archives {
		if !filepath.IsAbs(path) {
			return fmt.Errorf("heal.archives %q: not an absolute path", path)
		}
	}
	switch c.Images.Repair {
	case imagecheck.Off, imagecheck.Heal, imagecheck.Fetch, imagecheck.Full:
	default:
		return fmt.Errorf("images.repair %q: not one of off, heal, fetch, full", c.Images.Repair)
	}
	for _, socket := range []string{c.Address, sockets.Admin(c.Address)} {
		// sun_path with its terminating zero (unix(7)).
		if limit := len(unix.RawSockaddrUnix{}.Path) - 1; len(socket) > limit {
			return fmt.Errorf("address %q: socket path of %d bytes, the kernel allows %d", socket, len(socket), limit)
		}
	}
	switch {
	case !slices.Contains([]string{"auto", "igzip", "internal"}, c.Diff.Decompressor):
		return fmt.Errorf("diff.decompressor %q: not auto, igzip or internal", c.Diff.Decompressor)
	case !slices.Contains([]fsync.Mode{fsync.Auto, fsync.Syncfs, fsync.OwnFiles}, fsync.Mode(c.Diff.Sync)):
		return fmt.Errorf("diff.sync %q: not auto, syncfs or files", c.Diff.Sync)
	case c.Scrub.Interval < 0:
		return fmt.Errorf("scrub.interval %q: must not be negative", time.Duration(c.Scrub.Interval))
	case c.Scrub.Rate < 0:
		return fmt.Errorf("scrub.rate %d: must not be negative", c.Scrub.Rate)
	case c.Scrub.Depth != "metadata" && c.Scrub.Depth != "content":
		return fmt.Errorf("scrub.depth %q: not metadata or content", c.Scrub.Depth)
	case c.Admin.MetricsAddress != "" && !isHostPort(c.Admin.MetricsAddress):
		return fmt.Errorf("admin.metrics_address %q: not host:port", c.Admin.MetricsAddress)
	case c.Containerd.Address != "" && !filepath.IsAbs(c.Containerd.Address):
		return fmt.Errorf("containerd.address %q: not an absolute path", c.Containerd.Address)
	case c.Containerd.Address != "" && c.Containerd.Snapshotter == "":
		return errors.New("containerd.snapshotter: empty")
	}
	switch c.LogLevel {
	case "trace", "debug", "info", "warn", "error":
		return nil
	}
	return fmt.Errorf("log_level %q: not one of trace, debug, info, warn, error", c.LogLevel)
}

func isHostPort(address string) bool {
	_, port, err := net.SplitHostPort(address)
	return err == nil && port != ""
}

// snapshotter is the part of the configuration that the snapshotter sees.
func (c Config) snapshotter() snapshotter.Config {
	return snapshotter.Config{
		Root:           c.Root,
		MountOptions:   c.Snapshotter.MountOptions,
		UpperdirLabel:  c.Snapshotter.UpperdirLabel,
		SyncRemove:     c.Snapshotter.SyncRemove,
		SlowChown:      c.Snapshotter.SlowChown,
		JournalHistory: c.Journal.History,
		ContentRoot:    c.ContentRoot,
		Sync:           fsync.Mode(c.Diff.Sync),
		Archives:       c.Heal.Archives,
		Scrub: scrub.Config{
			Interval: time.Duration(c.Scrub.Interval), Depth: storage.Depth(c.Scrub.Depth), Rate: c.Scrub.Rate,
		},
	}
}

// notifier is the part of the configuration that the notifier of containerd uses.
func (c Config) notifier() notify.Config {
	return notify.Config{
		Address:     c.Containerd.Address,
		Snapshotter: c.Containerd.Snapshotter,
		ContentRoot: c.ContentRoot,
		Registry:    c.Heal.Registry,
		Hosts:       c.Heal.Hosts,
		DropImages:  c.Containerd.DropImages,
	}
}

// imageCheck is the part of the configuration that is about images.
func (c Config) imageCheck() imagecheck.Config {
	return imagecheck.Config{
		Address:     c.Containerd.Address,
		Socket:      c.Address,
		Snapshotter: c.Containerd.Snapshotter,
		ContentRoot: c.ContentRoot,
		Archives:    c.snapshotter().Outside(),
		Repair:      c.Images.Repair,
		Registry:    c.Heal.Registry,
		Hosts:       c.Heal.Hosts,
		DropImages:  c.Containerd.DropImages,
	}
}
