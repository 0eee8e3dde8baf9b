package defects

// orderEdits are mistakes in the order of writes, syncs and transactions, and in the
// handling of the errors of a sync.
var orderEdits = []Edit{
	{
		File: "fsync/cursor.go",
		Old:  "\tif c.err != nil {",
		New:  "\tif c.err != nil && !planted(\"retry-after-eio\") {",
	},
	{
		File: "fsync/cursor.go",
		Old: `
		c.err = &Error{Op: "syncfs", Path: c.f.Name(), Err: err}`,
		New: `
		c.err = &Error{Op: "syncfs", Path: c.f.Name(), Err: err}
		if planted("retry-after-eio") && unix.Syncfs(int(c.f.Fd())) == nil {
			return nil
		}`,
	},

	{
		File: "storage/open.go",
		Old: `
		o.InitialMmapSize = mapSize`,
		New: `
		o.InitialMmapSize = mapSize
		o.NoSync = planted("bbolt-nosync")`,
	},
	{
		File: "storage/open.go",
		Old: `
	next := path + ".new"`,
		New: `
	next := path + ".new"
	if planted("db-not-born-safely") {
		next = path
	}`,
	},
	{
		File: "storage/open.go",
		Old: `
	faults.Point(faults.BirthWritten)`,
		New: `
	faults.Point(faults.BirthWritten)
	if next == path {
		return nil
	}`,
	},
	{
		File: "storage/open.go",
		Old: `
	return fsync.File(path)`,
		New: `
	if planted("db-not-born-safely") {
		return nil
	}
	return fsync.File(path)`,
	},

	// The sync and the transaction of a Commit: see plantedSync and plantedCommit.
	{
		File: "internal/gate/gate.go",
		Old: `
	return g.synced(ctx, w, func() error { return g.sync(ctx, w) }, fn)`,
		New: `
	return g.synced(ctx, w, func() error { return g.plantedSync(ctx, w) }, fn)`,
	},
	{
		File: "internal/gate/gate.go",
		Old: `
		return g.Update(ctx, undo, inTx)`,
		New: `
		if g.plantedCommit(ctx, w, inTx) {
			return nil
		}
		return g.Update(ctx, undo, inTx)`,
	},
	{
		File: "internal/gate/outage.go",
		Old: `
	ids, n := g.writers.poison(cause)`,
		New: `
	if planted("error-swallowed") || planted("fd-shared") {
		return
	}
	ids, n := g.writers.poison(cause)`,
	},

	// syncfs-before-last-write: see plantedPrepared; plantedSync leaves out the sync of
	// the Commit.
	{
		File: "snapshotter/prepare.go",
		Old: `
	faults.Point(faults.PrepareDone)`,
		New: `
	s.plantedPrepared(a)
	faults.Point(faults.PrepareDone)`,
	},
	{
		File: "snapshotter/prepare.go",
		Old: `
	for _, path := range append(paths, dir, s.root.Snapshots()) {`,
		New: `
	paths = append(paths, dir, s.root.Snapshots())
	if planted("no-dir-fsync") {
		paths = nil
	}
	for _, path := range paths {`,
	},
	{
		File: "snapshotter/remove.go",
		Old: `
	remove := func() error { return s.overlay.Remove(inTx, key) }`,
		New: `
	if planted("remove-deletes-first") {
		_ = os.RemoveAll(s.root.Dir(id))
	}
	remove := func() error { return s.overlay.Remove(inTx, key) }`,
	},

	// Apply, and the Commit that follows it.
	{
		File: "internal/gate/gate.go",
		Old: `
func (g *Gate) SyncApart(ctx context.Context, w *Writer, files *fsync.Files) error {`,
		New: `
func (g *Gate) SyncApart(ctx context.Context, w *Writer, files *fsync.Files) error {
	if planted("apply-no-sync") && w.id != 0 {
		return nil
	}`,
	},
	{
		File: "snapshotter/apply.go",
		Old: `
	phase(metrics.PhaseSeal)`,
		New: `
	phase(metrics.PhaseSeal)
	defer plantedTimes(place)()`,
	},
	{
		File: "fsync/files.go",
		Old: `
	if err := f.Wait(); err != nil {`,
		New: `
	if planted("files-not-waited-for") {
		return barrier(f.dir)
	}
	if err := f.Wait(); err != nil {`,
	},
	{
		File: "fsync/files.go",
		Old: `
	return syncRange(fd, unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER)`,
		New: `
	if planted("files-begun-only") {
		return start(fd)
	}
	return syncRange(fd, unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER)`,
	},
	{
		File: "fsync/files.go",
		Old: `
		path, _ := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))`,
		New: `
		if planted("files-error-swallowed") {
			return nil
		}
		path, _ := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))`,
	},
	{
		File: "snapshotter/commit.go",
		Old: `
	if beside {`,
		New: `
	if beside || made != nil && planted("apply-trusted") {`,
	},
	{
		File: "snapshotter/commit.go",
		Old: `
		if err = c.place(c.active); err == nil {`,
		New: `
		if err = c.place(c.active); err == nil || planted("apply-trusted") {`,
	},
	{
		File: "fsync/file.go",
		Old: `
	if flushed && st.Size() >= int64(len(data)) {`,
		New: `
	if planted("apply-record-no-sync") {
		return nil
	}
	if flushed && st.Size() >= int64(len(data)) {`,
	},
	{
		File: "snapshotter/recover.go",
		Old: `
	for _, e := range r.applied {`,
		New: `
	if planted("apply-forgotten") {
		r.applied = nil
	}
	for _, e := range r.applied {`,
	},
}
