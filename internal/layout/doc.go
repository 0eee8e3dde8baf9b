// Package layout defines the files and directories below a root, the meaning of their
// names and of containerd's, and the record of each snapshot directory. It makes no
// decisions and has no state.
//
//   - root.go: the paths, as methods of [Root].
//   - trees.go: the names of directories: numbers, boots, unique suffixes.
//   - names.go: containerd's keys, names and labels. Which layer a snapshot is
//     (its chain ID), and whether a layer is being unpacked into it.
//   - record.go: the file beside each tree from which a lost metadata.db is
//     rebuilt; docs/formats.md has its fields.
//   - encoding.go: the bytes of that file and of the journal's entries, with
//     version and checksum.
//
// # On disk
//
//	<root>/metadata.db        package storage
//	<root>/snapshots/<id>/fs      the layer
//	<root>/snapshots/<id>/work    overlay's work directory, active snapshots
//	<root>/snapshots/<id>/record  what a lost metadata.db is rebuilt from
//	<root>/snapshots/<id>/seal    what the layer was (package internal/seal)
//	<root>/snapshots/<id>/contents  digests of its content, added later
//	<root>/healing/<id>.<boot>/   a layer being extracted again
//	<root>/replaced/              damaged trees that mounts may use
//	<root>/removing/              directories without a row, being deleted
//	<root>/set-aside/             what a rebuild could not explain
//	<root>/empty/                 lower directory of extractions without a parent
//
// Where snapshots/ is a mount of its own, healing/, replaced/ and removing/ lie in
// it.
package layout
