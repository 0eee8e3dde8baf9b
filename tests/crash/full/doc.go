// Package full cuts the power under a whole node: containerd with its content
// store and its database, and the snapshotter, on one recorded disk.
//
//	NewBench  containerd, a registry, four images, and their references:
//	          the built-in overlayfs unpacks them on a disk whose power is not cut
//	Record    a node at work on a recording disk ──▶ Recording
//	Choose    the few dozen states, of thousands, that are examined
//	Check     each of them: boot the node and query it ──▶ Tally
//
// In full:
//
//	func NewBench(ctx context.Context, programs *lab.Bench) (*Bench, error)
//	func (b *Bench) Record(ctx context.Context, s Setup) (*Recording, error)
//	func (b *Bench) Adopt(r *lab.Recording) *Recording   // after lab.Load; Save is that of lab.Recording
//	func (b *Bench) Second(ctx context.Context, r *Recording, k state.Case, daemon oracle.Process) (*Recording, error)
//	func (r *Recording) Choose(n int) []state.Case       // seeded by the recording
//	func (c *Check) Run(ctx context.Context) (*Tally, error)
//
// Recording is a lab.Recording with a little more, Tally is a lab.Tally with
// what is containerd's own, each result is a lab.Result. A state is named as in
// lab, by the recording, a slash, and the state.
//
// # The workload
//
// Orderly: images are pulled by the transfer service, some side by side, a
// container is prepared on one, images are removed and collected, pulled again.
// Interrupted: the client of a pull goes away at a random moment and another
// pulls the same image at once, while others remove images and have the garbage
// collected.
//
// By the CRI plugin: orderly, but images are pulled and removed over the CRI. The plugin runs
// in the examination, too: what it lists, and containers that are created as it does it.
//
// Damaged: layers were damaged before the log begins, and so were blobs. The
// daemon heals what has a good blob, and has containerd drop the images of the
// rest, which are pulled again. Astray: the content store that the daemon is
// configured with is another one, in which no blob is.
//
// Second is the workload of a node that boots after a power cut: it pulls
// everything again, and may be cut again.
//
// # Marks
//
// Between containerd and the daemon stands a gRPC server that passes every call
// on, unchanged, and appends to the log of the disk what was begun and what was
// answered, before containerd gets the answer. So each layer is judged as in
// package oracle. Around pulls and removals of images the client appends marks
// of its own.
//
// # What is verified of a state
//
// The daemon starts and recovers, and every layer is judged. containerd starts.
// Every snapshot in containerd's database is one of the daemon's. Every image
// that containerd calls unpacked can be mounted and equals its reference. Every
// image can be pulled again, and equals its reference then. When everything is
// removed, containerd's garbage collection leaves nothing in the daemon.
//
// Of a node with damaged layers, which blobs are good, on the disk and in
// containerd's database, is found out before the boot. When the daemon has had
// its time to drop images, those of which every damaged layer has a good blob must
// be there, with their names, their snapshots, and the rows of their good blobs.
//
// # What is containerd's own
//
// containerd does not sync all of its content store. An image that is listed
// and whose manifest or config cannot be read, a pull that ends because a blob
// is there and damaged, an image whose pull was answered and that is not
// listed: these are counted in Counts, apart, each with its reason, and the
// snapshotter is not blamed. A state on which containerd does not start was not
// measured.
package full
