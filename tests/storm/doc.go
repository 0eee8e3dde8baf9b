// Package storm runs everything at once against a real containerd: pulls by the
// transfer service, by the client library and by the CRI plugin in two namespaces,
// cancelled pulls and their retries, clients that are killed, removals of images,
// collections, prune, deletion of leases and of snapshot keys under running pulls,
// damage to layers and blobs, check and repair of layers and of images, pods that come and go,
// archives and a registry that are there and are not, kills and stops of containerd and of
// the daemon, containerd's records deleted, power cuts.
//
// A storm consists of rounds. In a round, actors work side by side for a second or
// two; each notes what it disturbs, and for how long, so that for every pull it is
// known whether anything has disturbed it. A pull that nothing has disturbed must
// succeed at the first try, at any time, and so must the start of a container. Then the
// actors stop, the node is given the time to mend what was damaged, and must be whole:
// every image can be pulled at once into both namespaces, its tree is what its tars
// describe, all lists work, and check --deep and check --images find nothing. At the end
// everything is removed and collected, and nothing may be left: no directory, no row in
// either database, no lease, no descriptor, no goroutine.
//
// What the actors do follows from the seed; how their steps interleave does not. The
// first violation ends the storm, and all that happened is kept on disk.
package storm
