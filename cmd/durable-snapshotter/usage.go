package main

const usage = `Usage: durable-snapshotter VERB [flags]

An overlayfs snapshotter for containerd: once a layer is committed, it is whole
on disk, whatever happens to the power.

Verbs:
  serve             serve containerd on a unix socket
  inspect [--json]  print snapshots and commit journal, of a running or a stopped daemon
  check [--deep] [--json] [--cached] [SNAPSHOT...]
                    compare committed layers with their seals, with --deep their content too,
                    and write nothing; --cached prints what is known, and verifies nothing
  check --images [--namespace NS] [--deep] [--json] [IMAGE...]
                    print for each image of containerd whether it is ready, what is missing and
                    from where it can be fetched, and what holds it; with --deep its content is
                    read; containerd must run
  repair [--apply] [--deep] [--json] [SNAPSHOT...]
                    print how damaged layers can be healed, and with --apply heal them
  repair --images [--namespace NS] [--deep] [--apply] [--force] [--json] [IMAGE...]
                    print how images that are not ready can be repaired, the least destructive
                    step first, and with --apply do it; with --force the snapshots of containers
                    that have ended are removed when they are in the way, with all they have written
  repair --orphans [--apply] [--json]
                    list snapshots that containerd does not know, of images that were removed
                    while it ran without this snapshotter, and with --apply remove them;
                    containerd must run, and have this snapshotter in its configuration
  repair --rebuild  make a new metadata.db from the layers' own records; the daemon must be stopped
  migrate [--to SNAPSHOTTER] [--finish] [--namespace NS] [--json] [IMAGE...]
                    unpack images that another snapshotter has into this one, or into SNAPSHOTTER
                    for the way back, from what is on the node; running containers do not notice;
                    with --finish containerd lets go of the snapshots in the others
  health            print whether a running daemon serves; exit status 1 if not, for probes
  doctor [--containerd-config FILE] [--json]
                    print what keeps this node from using the snapshotter, or weakens its promise,
                    the worst first, with the cure of each; nothing is changed
  doctor --print-config PLATFORM [FILE]
                    print what the configuration files of a platform need, or FILE alone:
                    containerd-2 (2.3 and newer), containerd-2.0 (to 2.2), containerd-1.7 (and
                    1.6), k3s, rke2, k0s, microk8s, talos, docker, buildkit; containerd-2-differ
                    and containerd-1.7-differ, so that the daemon extracts layers, too
  config            print the configuration in effect
  config default    print the default configuration
  version           print the version

Flags of every verb:
  --config FILE     configuration (default /etc/durable-snapshotter/config.toml)
  --root DIR        where snapshots live, overrides "root"
  --address SOCKET  unix socket, overrides "address"
  --log-level LEVEL trace, debug, info, warn or error, overrides "log_level"

Exit status: 0 done; 1 an error; 2 a usage error. Of check and repair: 0 all are
ready, or their content cannot be compared with anything yet; 1 some are damaged;
3 none is, but some could not be verified. 2 of check: it could not verify any.
Of repair --orphans: 0 none is left; 1 some are. With --images: 0 all images run, can be
unpacked, or were dropped for the next pull; 1 some do not; 3 the state of some is unknown,
or of any, as when containerd is down. Of migrate: 1 some images can only be pulled; 3 as above.
Of doctor: 0 nothing was found; 1 warnings; 2 failures.

Example:
  durable-snapshotter serve --root /var/lib/durable-snapshotter
`
