package seal

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
)

// TestSmallTexts: lines of a seal are the same when its text is known, a file that has
// changed is read again, and what is kept has a limit.
func TestSmallTexts(t *testing.T) {
	sealOf := func(names int) (file, digest string) {
		return writeSeal(t, func(write func(Entry)) {
			write(Entry{Path: ".", Stat: unix.Stat_t{Mode: unix.S_IFDIR}})
			for i := range names {
				write(Entry{Path: fmt.Sprintf("%05d", i), Stat: unix.Stat_t{Mode: unix.S_IFREG}})
			}
		})
	}
	lines := func(file, digest string, most int) (string, error) {
		var out strings.Builder
		n := 0
		err := eachLineBelow(file, digest, func(rel string, line []byte) (bool, error) {
			fmt.Fprintf(&out, "%s: %s\n", rel, line)
			n++
			return n != most, nil
		})
		return out.String(), err
	}
	for _, names := range []int{0, 5, 500} {
		file, digest := sealOf(names)
		// What is read first ends early: the rest of a small text is kept all the same.
		if some, err := lines(file, digest, 2); err != nil || strings.Count(some, "\n") != min(2, names+1) {
			t.Errorf("%d names, two lines: %q, %v", names, some, err)
		}
		now, _ := seenNow(file, digest)
		if _, known := small.get(now); known != (names < 500) {
			t.Errorf("%d names: known %t", names, known)
		}
		var want strings.Builder
		check(t, eachLine(file, digest, func(rel string, line []byte) (bool, error) {
			fmt.Fprintf(&want, "%s: %s\n", rel, line)
			return true, nil
		}))
		if got, err := lines(file, digest, -1); err != nil || got != want.String() {
			t.Errorf("%d names: %v, %q, want %q", names, err, got, want.String())
		}
		stop := errors.New("stop")
		if err := eachLineBelow(file, digest, func(string, []byte) (bool, error) { return true, stop }); !errors.Is(err, stop) {
			t.Errorf("%d names: error %v", names, err)
		}
		if _, err := lines(file, strings.Replace(digest, digest[7:8], "x", 1), -1); !errors.Is(err, mtree.ErrUnsealed) {
			t.Errorf("%d names, another digest: %v", names, err)
		}
		b, err := os.ReadFile(file)
		check(t, err)
		b[len(b)/2] ^= 0x10
		check(t, os.WriteFile(file, b, 0o600))
		if _, err := lines(file, digest, -1); !errors.Is(err, mtree.ErrUnsealed) {
			t.Errorf("%d names, a changed file: %v", names, err)
		}
		check(t, os.Remove(file))
		if _, err := lines(file, digest, -1); !errors.Is(err, mtree.ErrUnsealed) {
			t.Errorf("%d names, no file: %v", names, err)
		}
	}
	for i := range 3 * smallTexts / smallText {
		small.put(seen{ino: uint64(i)}, make([]byte, smallText))
		small.put(seen{ino: uint64(i)}, make([]byte, smallText)) // again
		sum := 0
		for _, text := range small.known {
			sum += len(text)
		}
		if sum > smallTexts || sum != small.bytes {
			t.Fatalf("%d bytes are kept, %d are counted", sum, small.bytes)
		}
	}
}
