// Package kit holds the real parts the tests and the demonstration are made of:
// a scratch disk whose power can be cut, a containerd and a client of its CRI
// plugin, the daemon under test and its verbs, what stands between the two and can
// answer instead, a registry, images, a node made of all that, another boot of the
// machine, a system with a process 1 of its own, and the fingerprint of a directory
// tree.
//
// Nothing here is a stand-in. containerd, ctr and the shim are built from the
// released module at the version in tests/go.mod, the disk is a loop device with
// a real file system, the registry is the reference implementation.
//
// Functions return errors and know nothing of package testing, so that a plain
// program can use them; package kittest makes them short for tests. Start with
// [Main], which gives the process its own mount and PID namespace: whatever
// happens afterwards, a panic and SIGKILL included, no mount, process or loop
// device outlives it. A typical program is
//
//	func main() { os.Exit(kit.Main(run)) }
//
//	bins, err := kit.Build(ctx)
//	reg, err := kit.StartRegistry(scratch)
//	node, err := kit.NewNode(kit.NodeOptions{Binaries: bins, Dir: dir, Disk: kit.DiskOptions{FS: "ext4"}, Registry: reg, Heals: true})
//	err = node.Start(ctx)
//	img, err := node.Push(ctx, "all-kinds", kit.AllKinds())
//	out, err := node.Ctr(ctx, "image", "pull", "--plain-http", "--snapshotter", "durable", img.Ref)
//	err = node.Disk.Shutdown() // the power goes
//	err = kit.NewBoot()        // and comes back
//	err = node.Close()
package kit
