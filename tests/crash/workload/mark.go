package workload

import (
	"fmt"
	"strings"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
)

// Phase of a call.
type Phase string

// The phases.
const (
	Begin Phase = "begin"
	Ack   Phase = "ack"
	Fail  Phase = "fail"
)

// Op is the call.
type Op string

// The calls that promise something. Report is no call: an examination of the disk, after
// a crash, found the committed name. Verify is a comparison of content that has
// found the damage of a corrupt layer, and healed it if there was a blob.
const (
	Prepare Op = "prepare"
	Commit  Op = "commit"
	Remove  Op = "remove"
	Report  Op = "report"
	Verify  Op = "verify"
)

// Mark is a mark in the log of the disk.
type Mark struct {
	Index int // in the log
	Phase Phase
	Op    Op
	Name  string // committed name or active key
	Key   string // of Commit: the active key
}

// Text is how the mark stands in the log.
func (m Mark) Text() string {
	return fmt.Sprintf("%s %s\t%s\t%s", m.Phase, m.Op, m.Name, m.Key)
}

// Marks finds the marks of workloads in a log. Marks of others, such as those
// of the disk's own faults, are left out.
func Marks(log []disk.Entry) []Mark {
	var out []Mark
	for i, e := range log {
		if e.Kind != disk.Mark {
			continue
		}
		fields := strings.Split(e.Text, "\t")
		if len(fields) != 3 {
			continue
		}
		phase, op, _ := strings.Cut(fields[0], " ")
		out = append(out, Mark{i, Phase(phase), Op(op), fields[1], fields[2]})
	}
	return out
}

// Marker appends to the log of a disk; *disk.Disk does.
type Marker interface {
	Mark(text string) (int, error)
}
