package seal

import (
	"bytes"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
)

// Texts of small seals stay in memory: the Commit of each layer of a long chain reads the
// seals of all layers below it.
const (
	smallText  = 8 << 10 // bytes of a text that stays
	smallTexts = 1 << 20 // bytes of all of them
)

// seen identifies a seal that was read: its text by the digest, and the state of its file. A
// file that was changed or replaced is read again.
type seen struct {
	digest string
	ino    uint64
	dev    uint64
	size   int64
	ctime  unix.Timespec
}

// seenNow is what the file is now; ok is false when it is not there.
func seenNow(file, digest string) (s seen, ok bool) {
	var st unix.Stat_t
	if unix.Stat(file, &st) != nil {
		return s, false
	}
	return seen{digest, st.Ino, st.Dev, st.Size, st.Ctim}, true
}

type texts struct {
	mu    sync.Mutex
	known map[seen][]byte // whole lines, without the header
	bytes int
}

var small = texts{known: map[seen][]byte{}}

func (t *texts) get(s seen) (text []byte, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	text, ok = t.known[s]
	return text, ok
}

// put keeps a text, which the caller does not change any more. When there is no room, all
// others go: those of the chains that are in use come back.
func (t *texts) put(s seen, text []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, twice := t.known[s]; twice {
		return // read side by side
	}
	if t.bytes += len(text); t.bytes > smallTexts {
		clear(t.known)
		t.bytes = len(text)
	}
	t.known[s] = text
}

// eachLineBelow is eachLine for the seal of a layer below, whose text may be known from an
// earlier call.
func eachLineBelow(file, digest string, fn func(rel string, line []byte) (more bool, err error)) error {
	now, there := seenNow(file, digest)
	if text, ok := small.get(now); there && ok {
		return eachLineOf(text, fn)
	}
	read, more := []byte{}, true
	err := eachLine(file, digest, func(rel string, line []byte) (_ bool, err error) {
		if read != nil && len(read)+len(line) < smallText {
			read = append(append(read, line...), '\n')
		} else {
			read = nil
		}
		if more {
			more, err = fn(rel, line)
		}
		return more || read != nil, err
	})
	if err == nil && there && read != nil {
		small.put(now, read)
	}
	return err
}

func eachLineOf(text []byte, fn func(rel string, line []byte) (more bool, err error)) error {
	for more := true; more && len(text) > 0; {
		line, rest, _ := bytes.Cut(text, []byte("\n"))
		rel, err := mtree.PathOf(line)
		if err == nil {
			more, err = fn(rel, line)
		}
		if err != nil {
			return err
		}
		text = rest
	}
	return nil
}
