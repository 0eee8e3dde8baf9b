package state

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Class is which of the volatile writes are on the disk.
type Class uint8

// The classes, as in the package documentation.
const (
	Prefix Class = iota
	Flushed
	Drop
	Keep
	Subset
	Torn
	Mix
)

var classNames = []string{"prefix", "flushed", "drop", "keep", "subset", "torn", "mix"}

func (c Class) String() string {
	if int(c) < len(classNames) {
		return classNames[c]
	}
	return fmt.Sprintf("class(%d)", uint8(c))
}

// Classes lists all classes.
func Classes() []Class { return []Class{Prefix, Flushed, Drop, Keep, Subset, Torn, Mix} }

// numbered reports whether states of the class have a number.
func (c Class) numbered() bool { return c != Prefix && c != Flushed }

// State names one disk that a power cut could leave.
type State struct {
	Point  int // the number of entries of the log that had been sent
	Class  Class
	Number uint64 // which one of its class
}

func (s State) String() string {
	if !s.Class.numbered() {
		return fmt.Sprintf("%d.%s", s.Point, s.Class)
	}
	return fmt.Sprintf("%d.%s.%x", s.Point, s.Class, s.Number)
}

// Parse reads what String has printed.
func Parse(text string) (State, error) {
	parts := strings.Split(text, ".")
	if len(parts) < 2 || len(parts) > 3 {
		return State{}, fmt.Errorf("state %q: want point.class or point.class.number", text)
	}
	point, err := strconv.Atoi(parts[0])
	if err != nil || point < 0 {
		return State{}, fmt.Errorf("state %q: bad point %q", text, parts[0])
	}
	class := Class(slices.Index(classNames, parts[1]))
	if int(class) >= len(classNames) {
		return State{}, fmt.Errorf("state %q: unknown class %q", text, parts[1])
	}
	s := State{Point: point, Class: class}
	if class.numbered() != (len(parts) == 3) {
		return State{}, fmt.Errorf("state %q: %s with or without a number, against the rule", text, class)
	}
	if class.numbered() {
		if s.Number, err = strconv.ParseUint(parts[2], 16, 64); err != nil {
			return State{}, fmt.Errorf("state %q: bad number %q", text, parts[2])
		}
	}
	return s, nil
}

// Path is a state, the state that a second cut makes of its recovery, and so
// on.
type Path []State

func (p Path) String() string {
	var parts []string
	for _, s := range p {
		parts = append(parts, s.String())
	}
	return strings.Join(parts, ">")
}

// ParsePath reads what Path.String has printed.
func ParsePath(text string) (Path, error) {
	var p Path
	for part := range strings.SplitSeq(text, ">") {
		s, err := Parse(part)
		if err != nil {
			return nil, err
		}
		p = append(p, s)
	}
	return p, nil
}
