// Package crash proves the promise of durable-snapshotter by cutting the power
// at every write: see README.md beside this file. The command is cmd/crashlab.
package crash
