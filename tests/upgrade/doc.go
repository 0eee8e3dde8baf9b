// Package upgrade replaces the daemon's program under load, again and again, as a package
// manager does: a new file takes the place of the old one, the daemon is stopped, and the new
// one gets the same sockets, which systemd has kept open. Meanwhile images are pulled in all
// ways and removed, and pods run.
//
// Pods must not notice. A pull may fail once, and must succeed when its client tries again.
// What was pulled is there, equal to its tars, and check --deep finds nothing.
package upgrade
