// Package kit holds the real parts the tests and the demonstration are made of:
// a scratch disk whose power can be cut, a containerd and a client of its CRI
// plugin, the daemon under test, what stands between the two and can answer
// instead, a registry, images, another boot of the machine, and the fingerprint of
// a directory tree.
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
//	disk, err := kit.NewDisk(dir, kit.DiskOptions{FS: "ext4", Size: 2 << 30})
//	bins, err := kit.Build(ctx)
//	daemon, err := kit.StartDaemon(ctx, kit.DaemonOptions{Binary: bins.Daemon, Dir: disk.Path("durable")})
//	cd, err := kit.StartContainerd(ctx, kit.ContainerdOptions{Binaries: bins, Dir: disk.Path("containerd"), Daemon: daemon})
//	reg, err := kit.StartRegistry(scratch)
//	img, err := kit.Push(ctx, reg, "all-kinds", kit.AllKinds())
//	out, err := cd.Ctr(ctx, "image", "pull", "--plain-http", "--snapshotter", "durable", img.Ref)
//	err = disk.Shutdown() // the power goes
//	err = kit.NewBoot()   // and comes back
package kit
