// Package configs starts containerd with every configuration text of README.md
// and docs/containerd.md, on a machine where the text stands at the path that the
// documentation names and beside the main file that it is for, and queries the
// running containerd what came of it.
//
// The machine is this one with a private /etc, /opt, /run and /var/lib, so that
// containerd and durable-snapshotter run with their default paths and without a
// flag. Main files are what `containerd config default` of the release prints,
// what kubeadm's instructions make of that, and files with the tables that k3s,
// RKE2 and image-based distributions write.
//
// make test runs for each place the oldest and the newest that fit of quickReleases;
// make test-configs runs all releases. The binaries come from the Go module proxy and
// stay in tests/.bin.
package configs
