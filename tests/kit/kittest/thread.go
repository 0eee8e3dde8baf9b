package kittest

import "runtime"

// containerd's mount package gives a thread another working directory when the
// options of a mount are long, and ends the thread afterwards. The main thread
// cannot end: it would stay there for ever, and keep the disk from being
// unmounted. Locked here, it only ever runs TestMain.
func init() { runtime.LockOSThread() }
