package main

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

const made = "# Made from the usage text by make generate.\n"

// choices are the values that the text of a flag lists, such as "trace, debug, info,
// warn or error".
var choices = regexp.MustCompile(`^((?:[a-z]+, )+[a-z]+ or [a-z]+)`)

// values are the words that can follow a flag, if they are known.
func (o option) values() []string {
	m := choices.FindString(o.text)
	return strings.FieldsFunc(strings.ReplaceAll(m, " or ", ","), func(r rune) bool { return r == ',' || r == ' ' })
}

// isPath reports whether the value of a flag is a path.
func (o option) isPath() bool { return slices.Contains([]string{"FILE", "DIR", "SOCKET"}, o.value) }

// short is the beginning of a text, without a stop, for lists.
func short(text string) string {
	s, _, _ := strings.Cut(text, ";")
	s, _, _ = strings.Cut(s, ",")
	return strings.TrimSuffix(s, ".")
}

// flags are those of a verb and those of every verb, as words.
func (u usage) flags(c call) (all []string) {
	for _, o := range slices.Concat(c.options, u.common) {
		all = append(all, "--"+o.name)
	}
	return all
}

// allOptions are the flags of all verbs, each once.
func (u usage) allOptions() []option {
	all := slices.Clone(u.common)
	for _, v := range u.verbs() {
		for _, o := range v.options {
			if !slices.ContainsFunc(all, func(a option) bool { return a.name == o.name }) {
				all = append(all, o)
			}
		}
	}
	return all
}

// bash needs no library of completions.
func bash(u usage) string {
	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	b.WriteString(made)
	p("_durable_snapshotter() {\n\tlocal cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} words=")
	p("\tCOMPREPLY=()\n\tcase $prev in")
	for _, o := range u.allOptions() {
		switch {
		case o.isPath():
			p("\t--%s) mapfile -t COMPREPLY < <(compgen -f -- \"$cur\"); return ;;", o.name)
		case len(o.values()) > 0:
			p("\t--%s) mapfile -t COMPREPLY < <(compgen -W '%s' -- \"$cur\"); return ;;", o.name, strings.Join(o.values(), " "))
		case o.value != "":
			p("\t--%s) return ;;", o.name)
		}
	}
	p("\tesac\n\tif ((COMP_CWORD == 1)); then")
	var names []string
	for _, v := range u.verbs() {
		names = append(names, v.verb)
	}
	p("\t\twords='%s help'\n\telse\n\t\tcase ${COMP_WORDS[1]} in", strings.Join(names, " "))
	for _, v := range u.verbs() {
		p("\t\t%s) words='%s' ;;", v.verb, strings.Join(append(slices.Clone(v.words), u.flags(v)...), " "))
	}
	p("\t\tesac\n\tfi\n\tmapfile -t COMPREPLY < <(compgen -W \"$words\" -- \"$cur\")\n}")
	p("complete -F _durable_snapshotter durable-snapshotter")
	return b.String()
}

// zshText escapes a text for a specification in single quotes.
func zshText(s string) string {
	return strings.NewReplacer(`'`, `'\''`, `[`, `\[`, `]`, `\]`, `:`, `\:`).Replace(s)
}

func (o option) zsh() string {
	spec := "--" + o.name
	if o.text != "" {
		spec += "[" + zshText(short(o.text)) + "]"
	}
	switch {
	case o.value == "DIR":
		spec += ":" + o.value + ":_files -/"
	case o.isPath():
		spec += ":" + o.value + ":_files"
	case len(o.values()) > 0:
		spec += ":" + o.value + ":(" + strings.Join(o.values(), " ") + ")"
	case o.value != "":
		spec += ":" + o.value + ": "
	}
	return "'" + spec + "'"
}

func zsh(u usage) string {
	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	b.WriteString("#compdef durable-snapshotter\n" + made)
	p("local -a verbs common")
	p("verbs=(")
	for _, v := range u.verbs() {
		p("\t'%s:%s'", v.verb, zshText(short(v.text)))
	}
	p(")\ncommon=(")
	for _, o := range u.common {
		p("\t%s", o.zsh())
	}
	p(")\nif ((CURRENT == 2)); then\n\t_describe verb verbs\n\treturn\nfi")
	p("local verb=$words[2]\nshift words\n((CURRENT--))\ncase $verb in")
	for _, v := range u.verbs() {
		var specs []string
		if len(v.words) > 0 {
			specs = append(specs, "'1::word:("+strings.Join(v.words, " ")+")'")
		}
		for _, o := range v.options {
			specs = append(specs, o.zsh())
		}
		p("%s) _arguments $common %s ;;", v.verb, strings.Join(specs, " "))
	}
	p("esac")
	return b.String()
}

// fishText escapes a text in single quotes.
func fishText(s string) string { return strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(s) }

func (o option) fish(condition string) string {
	line := "complete -c durable-snapshotter -n '" + condition + "' -l " + o.name
	switch {
	case o.isPath():
		line += " -rF"
	case len(o.values()) > 0:
		line += " -x -a '" + strings.Join(o.values(), " ") + "'"
	case o.value != "":
		line += " -x"
	}
	if o.text != "" {
		line += " -d '" + fishText(short(o.text)) + "'"
	}
	return line
}

func fish(u usage) string {
	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	b.WriteString(made)
	p("complete -c durable-snapshotter -f")
	for _, v := range u.verbs() {
		p("complete -c durable-snapshotter -n __fish_use_subcommand -a %s -d '%s'", v.verb, fishText(short(v.text)))
	}
	for _, o := range u.common {
		p("%s", o.fish("not __fish_use_subcommand"))
	}
	for _, v := range u.verbs() {
		seen := "__fish_seen_subcommand_from " + v.verb
		for _, w := range v.words {
			p("complete -c durable-snapshotter -n '%s' -a %s", seen, w)
		}
		for _, o := range v.options {
			p("%s", o.fish(seen))
		}
	}
	return b.String()
}
