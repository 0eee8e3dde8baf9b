package pulls

import "github.com/durable-snapshotter/durable-snapshotter/tests/bench/published"

// schema is the version of Report. A field that changes its meaning needs another one.
const schema = 1

// Report is one run of the benchmark.
type Report struct {
	published.Origin
	Base string `json:"base,omitempty"`
	FS   string `json:"fs"`   // ext4, xfs or btrfs
	Disk string `json:"disk"` // fast, 250 or emmc: see Disks
	// Fetched: all blobs were in containerd's content store before the pull was measured, which
	// had only to unpack them.
	Fetched bool `json:"fetched,omitempty"`
	// Neighbor is the rate, in bytes a second, at which another process was to write to pages of a
	// file on the same file system. 0: there was none.
	Neighbor int64    `json:"neighbor,omitempty"`
	Rounds   int      `json:"rounds"` // that are counted
	Scale    int      `json:"scale"`  // images have one part in so many of their inodes and bytes
	LeftOut  []string `json:"left_out,omitempty"`
	Images   []Image  `json:"images"`
	Proofs   []Proof  `json:"proofs"`
	Pulls    []Pull   `json:"pulls"`
}

// Proof is what a disk could do before the first pull, measured through its file system with
// direct I/O.
type Proof struct {
	Variant  string  `json:"variant"`  // whose disk it is
	Bytes    float64 `json:"bytes"`    // written in a second, in requests of 1 MiB, by four threads
	Requests float64 `json:"requests"` // writes of 4 KiB in a second, by four threads
}

// Setting is what a pull has in common with those that it is compared with.
type Setting struct {
	Image   string `json:"image"`
	Unpacks int    `json:"unpacks"` // layers that containerd unpacks at a time
	Igzip   bool   `json:"igzip"`   // igzip is on PATH, and containerd uses it; see start
}

// Pull is one pull.
type Pull struct {
	Setting
	Round   int     `json:"round"`
	Variant string  `json:"variant"`
	Seconds float64 `json:"seconds"` // from the start of ctr to its end
	// CPU is the processor time in seconds of containerd, the daemon, ctr, and the children of
	// these that have ended, such as igzip, until the end of ctr. That of the kernel's own
	// threads and of the registry is not in it. Its resolution is 10 ms a process.
	CPU float64 `json:"cpu"`
	// Later is the same, from the end of ctr until the processes were idle.
	Later float64 `json:"later_cpu"`
	// Sync is the time of a syncfs right after the pull.
	Sync float64 `json:"sync"`
	// Writes, Bytes and Flushes are the write requests, the written bytes and the cache flushes of
	// the loop device, from the start of the pull to the end of that syncfs.
	Writes  int64 `json:"writes"`
	Bytes   int64 `json:"bytes"`
	Flushes int64 `json:"flushes"`
	// ContainerdMemory and DaemonMemory are the most resident memory in bytes (VmHWM).
	ContainerdMemory int64 `json:"containerd_memory"`
	DaemonMemory     int64 `json:"daemon_memory,omitempty"`
	// Commits are those of the daemon, in its own histogram. The built-in snapshotters have none.
	Commits *Histogram `json:"commits,omitempty"`
	// Phases are the seconds of the daemon's Applies and Commits and of their phases, of all layers
	// together, by name: "apply", "apply sync", "commit".
	Phases map[string]float64 `json:"phases,omitempty"`
	// Beside it, with a neighbor only: what it wrote in bytes a second, a process that writes 4 KiB
	// and syncs them (fdatasync) every 5 ms, and one that creates and deletes a lease of
	// containerd every 50 ms.
	NeighborRate float64  `json:"neighbor_rate,omitempty"`
	Fdatasync    *Latency `json:"fdatasync,omitempty"`
	Lease        *Latency `json:"lease,omitempty"`
}

// Histogram is one of Prometheus: how many took at most so many seconds.
type Histogram struct {
	Count   uint64   `json:"count"`
	Seconds float64  `json:"seconds"` // of all together
	Buckets []Bucket `json:"buckets"`
}

// Bucket counts what took at most so many seconds.
type Bucket struct {
	AtMost float64 `json:"at_most"`
	Count  uint64  `json:"count"`
}

// Latency summarizes the operations of one kind during a pull, in seconds.
type Latency struct {
	Count int     `json:"count"`
	P50   float64 `json:"p50"`
	P99   float64 `json:"p99"`
	Max   float64 `json:"max"`
}

// Save writes a report.
func (r *Report) Save(file string) error { return published.Save(file, r) }

// Load reads a report.
func Load(file string) (*Report, error) {
	r := &Report{}
	return r, published.Load(file, schema, r)
}
