// Package doctor makes the failures of a node that durable-snapshotter doctor is to find, one at
// a time and for real, and expects that it names each with a cure, and that it finds nothing on
// a node without one. Judgments by facts that this machine cannot have are tested in
// internal/doctor.
package doctor
