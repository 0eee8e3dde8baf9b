// Package layers has what is known of the committed layers of a root: it verifies
// them, heals those that are damaged, and answers for the others.
//
// # States
//
// A layer is ready, unverified, damaged or healing. After an unclean shutdown all
// are unverified. [Layers.Wait] verifies and heals what a caller needs, the
// parents first; [Layers.Run] does it in the background, takes content digests, and
// scrubs. [Layers.Ready] and [Layers.Has] use only what is known: containerd holds
// its lock while it waits for a Commit.
//
// A damaged layer is extracted again from its blob in containerd's content store,
// under the same name and number, or refused with [DamagedError]. When much is
// damaged at once, mending stops until an operator decides: see package internal/brake.
//
// # Who calls whom
//
// Layers writes through the gate, and shares the locks of keys with the snapshotter.
// It calls nothing above it, but for the functions in [Config].
//
// # Lock order
//
// Locks, outermost first:
//
//	a key of Keys  one operation per key: an exchange of trees, as a Remove
//	               (here the locks of package gate)
//	flushMu        one writing of states to the journal at a time
//	table.mu       what is known of layers, short; nothing else is locked under it
//
// Verifying layers and extracting them runs outside all of them; the exchange of
// trees takes the key and the gate, as a Commit does.
package layers
