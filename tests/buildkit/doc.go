// Package buildkit shows that what BuildKit and a commit of a container leave on
// durable-snapshotter survives a power cut: BuildKit's containerd worker builds from a
// Dockerfile into containerd's image store and into an archive, and a container's changes
// become a layer by containerd's diff service, as nerdctl commit does it. Layers are extracted
// by containerd, and by the daemon's differ.
//
// BuildKit is built from the module in programs, in a cold cache within ten minutes. So make
// test skips this; make test-matrix runs it.
package buildkit
