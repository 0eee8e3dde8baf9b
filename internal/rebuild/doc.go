// Package rebuild makes a new metadata.db from the records beside the layers. It
// works offline, below a root whose daemon does not run, and needs nothing of the old
// database: each snapshot directory has a record of its own row (internal/layout),
// and each committed layer a seal (internal/seal).
//
// # What is restored
//
// A committed layer is restored when its tree is exactly what its seal describes,
// and its parents are restored. An active snapshot or a view is restored when its
// parents are. When two directories claim one name, the one with the higher number
// is restored: the other one had been removed and not yet been deleted.
//
// Everything else moves to set-aside/, with the reason in the result. Nothing is
// deleted.
//
// # Order
//
//	move what is not restored to set-aside/
//	syncfs of the file system of snapshots/
//	install the new database, keep the old one
//
// In this order, because the next start deletes each directory that the database
// does not list. A rebuild that is cut short anywhere can be run again.
package rebuild
