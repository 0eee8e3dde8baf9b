package tree

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Gone reports whether a file or directory is known not to exist. It is false for an error
// that may have another cause.
func Gone(path string) bool {
	_, err := statx(path)
	return Missing(err)
}

// Missing reports an error that means: no file has this path.
func Missing(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) }

// Unreadable reports an error that means: the disk, or the file system on it,
// cannot read what was written. Other errors are no evidence of anything about a file.
func Unreadable(err error) bool {
	for _, lost := range []error{
		unix.EIO,
		unix.ENODATA, // critical medium error, of the block layer
		unix.EUCLEAN, // EFSCORRUPTED of the file systems
		unix.EBADMSG, // EFSBADCRC
	} {
		if errors.Is(err, lost) {
			return true
		}
	}
	return false
}

// Evidence returns an error of a file below the directory top as it is, but
// without its number when top cannot be read either: then the whole file system
// is unavailable (an xfs that has shut itself down returns EIO for everything),
// and that is no evidence about the file.
func Evidence(err error, top string) error {
	if _, topErr := statx(top); topErr != nil {
		return fmt.Errorf("the file system is unavailable: %s", err)
	}
	return err
}

// Retry repeats a system call as long as a signal interrupts it.
func Retry(call func() (int, error)) (n int, err error) {
	for {
		if n, err = call(); !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
