package main

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// usage is the usage text in parts.
type usage struct {
	about   string // what the program is
	calls   []call // in the order of the text
	common  []option
	status  string // of the exit
	example string
}

// call is one way to call a verb; a verb may have several.
type call struct {
	verb     string
	synopsis string // with the verb
	text     string
	words    []string // that may follow the verb, such as default
	options  []option
}

// option is a flag; value is the name of its value, such as FILE, or empty.
type option struct{ name, value, text string }

// verbs lists each verb once, with the text of its first call and the flags and words
// of all.
func (u usage) verbs() (all []call) {
	for _, c := range u.calls {
		i := slices.IndexFunc(all, func(v call) bool { return v.verb == c.verb })
		if i < 0 {
			i = len(all)
			all = append(all, call{verb: c.verb, text: c.text})
		}
		all[i].words = append(all[i].words, c.words...)
		for _, o := range c.options {
			if !slices.Contains(all[i].options, o) {
				all[i].options = append(all[i].options, o)
			}
		}
	}
	return all
}

var (
	// A line of a list: its head, and after two spaces or more its text; after a flag
	// with a value, one is enough.
	headed   = regexp.MustCompile(`^  (\S+(?: \S+)*)(?:  +(.*))?$`)
	flagged  = regexp.MustCompile(`^  (--[a-z-]+ [A-Z]+) +(.*)$`)
	optional = regexp.MustCompile(`--([a-z-]+)(?: ([A-Z]+))?`)
	literal  = regexp.MustCompile(`^[a-z]+$`)
)

// parse splits the usage text. What it cannot place is an error: it would be
// missing from the manual page.
func parse(text string) (u usage, err error) {
	parts := strings.Split(strings.TrimRight(text, "\n"), "\n\n")
	if !strings.HasPrefix(parts[0], "Usage: durable-snapshotter ") || len(parts) < 3 {
		return u, errors.New("the text does not begin with Usage: durable-snapshotter")
	}
	u.about = join(parts[1])
	for _, part := range parts[2:] {
		title, rest, _ := strings.Cut(part, "\n")
		switch {
		case title == "Verbs:":
			err = list(rest, func(head, text string) error {
				c := call{synopsis: head, text: text}
				words := strings.Fields(head)
				c.verb = words[0]
				for _, w := range words[1:] {
					if literal.MatchString(w) {
						c.words = append(c.words, w)
					}
				}
				for _, m := range optional.FindAllStringSubmatch(head, -1) {
					c.options = append(c.options, option{name: m[1], value: m[2]})
				}
				u.calls = append(u.calls, c)
				return nil
			})
		case title == "Flags of every verb:":
			err = list(rest, func(head, text string) error {
				m := optional.FindStringSubmatch(head)
				if m == nil {
					return fmt.Errorf("not a flag: %q", head)
				}
				u.common = append(u.common, option{m[1], m[2], text})
				return nil
			})
		case title == "Example:":
			u.example = strings.TrimSpace(rest)
		case strings.HasPrefix(part, "Exit status: "):
			u.status = join(strings.TrimPrefix(part, "Exit status: "))
		default:
			return u, fmt.Errorf("a part that is not known: %q", title)
		}
		if err != nil {
			return u, err
		}
	}
	if len(u.calls) == 0 || len(u.common) == 0 || u.status == "" {
		return u, errors.New("the text lacks verbs, flags or the exit status")
	}
	return u, nil
}

// list calls f for each item of a list: a head, and the text beside and below it.
func list(text string, f func(head, text string) error) error {
	var head string
	var lines []string
	end := func() error {
		if head == "" {
			return nil
		}
		return f(head, join(strings.Join(lines, "\n")))
	}
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		if strings.HasPrefix(line, "   ") {
			lines = append(lines, line)
			continue
		}
		m := flagged.FindStringSubmatch(line)
		if m == nil {
			m = headed.FindStringSubmatch(line)
		}
		if m == nil {
			return fmt.Errorf("not an item of a list: %q", line)
		}
		if err := end(); err != nil {
			return err
		}
		head, lines = m[1], []string{m[2]}
	}
	return end()
}

// join makes one line of several.
func join(s string) string { return strings.Join(strings.Fields(s), " ") }
