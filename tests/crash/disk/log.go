package disk

import "fmt"

// Kind is what an Entry of the log is.
type Kind uint8

// The kinds. A FUA write arrives as a Write and a Flush.
const (
	Write   Kind = iota + 1 // Data at Offset
	Flush                   // everything before it is on stable storage
	Discard                 // Length bytes at Offset read as zero from here on
	Mark                    // Text, appended by a test
)

func (k Kind) String() string {
	switch k {
	case Write:
		return "write"
	case Flush:
		return "flush"
	case Discard:
		return "discard"
	case Mark:
		return "mark"
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// Entry is one line of the log.
type Entry struct {
	Kind   Kind
	Offset int64
	Length int64
	Data   []byte // of a Write, Length bytes
	Text   string // of a Mark
}

// Touches reports whether the entry changes bytes of the image.
func (e *Entry) Touches() bool { return e.Kind == Write || e.Kind == Discard }

// Apply makes the entry's change to an image.
func (e *Entry) Apply(image []byte) {
	switch e.Kind {
	case Write:
		copy(image[e.Offset:e.Offset+e.Length], e.Data)
	case Discard:
		clear(image[e.Offset : e.Offset+e.Length])
	}
}

func (e *Entry) String() string {
	switch e.Kind {
	case Write, Discard:
		return fmt.Sprintf("%s %d+%d", e.Kind, e.Offset, e.Length)
	case Mark:
		return fmt.Sprintf("mark %q", e.Text)
	}
	return e.Kind.String()
}

// Range is a part of the disk, in bytes.
type Range struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
}

// Overlaps reports whether any byte lies in both ranges.
func (r Range) Overlaps(o Range) bool {
	return r.Offset < o.Offset+o.Length && o.Offset < r.Offset+r.Length
}

// Stats counts what arrived since the start or the last Reset.
type Stats struct {
	Entries  int   `json:"entries"` // length of the log
	Writes   int   `json:"writes"`
	Flushes  int   `json:"flushes"`
	Discards int   `json:"discards"`
	Marks    int   `json:"marks"`
	Reads    int   `json:"reads"`
	Bytes    int64 `json:"bytes"`    // of data written
	Overflow bool  `json:"overflow"` // the log is full, entries are missing

	Faults []FaultStats `json:"faults"` // of the faults injected and not healed
}
