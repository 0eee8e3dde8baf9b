// Package idle does work that must not slow down other work: on a thread with idle I/O
// priority, and at a limited number of bytes per second.
//
// The priority is that of ioprio_set(2). The schedulers bfq and mq-deadline
// respect it. With the scheduler none, which is usual for NVMe, only the limit
// has an effect.
//
// The priority for the CPU stays as it is. A Go program that stops for its
// garbage collector waits for each thread that runs Go code, so a thread that
// the kernel does not schedule delays all of them: on two busy cores the world
// took 8 ms to stop (95th percentile) with a thread that computes at the usual
// priority, 400 ms with one at nice 19, and 900 ms with SCHED_IDLE.
package idle

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// From linux/ioprio.h; package unix does not have them.
const (
	whoProcess = 1 // and the id 0: the calling thread
	classIdle  = 3 << 13
)

// Run calls fn on a thread of its own at idle I/O priority and returns its
// error. What fn reads by itself, not in other goroutines, is read at that
// priority. If it cannot be set, fn is not called.
func Run(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		// Never unlocked: so the thread ends with this goroutine, and no
		// other goroutine gets it with its priority (runtime.LockOSThread).
		// The first thread of a process does not end, but is not used again.
		runtime.LockOSThread()
		if _, _, errno := unix.RawSyscall(unix.SYS_IOPRIO_SET, whoProcess, 0, classIdle); errno != 0 {
			done <- fmt.Errorf("set idle I/O priority: %w", errno)
			return
		}
		done <- fn()
	}()
	return <-done
}
