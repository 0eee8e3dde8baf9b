// Package paths measures what a node does all the time, whatever it pulls: each call of a snapshotter,
// and the start, with few snapshots and with many, on short chains of parents and on long ones.
// Command bench, in tests/cmd, is its program.
//
// The daemon and containerd's own overlayfs snapshotter are served over gRPC, each by a process of
// its own, have the same rows on the same disk, and take turns call by call. containerd has its own
// snapshotter in its process: what the connection costs is in both figures, and not in what is
// compared.
package paths
