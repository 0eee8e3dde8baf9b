// Package commit shows that the commit protocol keeps its promises: with a
// daemon killed at every named point, with disks that refuse writes or are
// full, under load, and with its database lost.
//
// Everything here talks to a daemon process through its sockets, as containerd
// does, on real file systems on loop devices. What must hold is numbered in
// docs/design.md: I1 durable commit, I2 no lies, I3 agreement, I4 a failed sync
// is final, I5 no orphan and no victim.
package commit
