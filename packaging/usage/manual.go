package main

import (
	"fmt"
	"strings"
)

// roff escapes a line of text for man(7).
func roff(s string) string {
	s = strings.NewReplacer(`\`, `\e`, "-", `\-`, "'", `\(aq`).Replace(s)
	if strings.HasPrefix(s, ".") {
		s = `\&` + s
	}
	return s
}

// manual is the page for section 8. It has no date and no version: it changes with
// the text only.
func manual(u usage) string {
	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	about, _, _ := strings.Cut(u.about, ":")
	p(`.\" Made from the usage text by make generate.`)
	p(`.TH DURABLE\-SNAPSHOTTER 8`)
	p(".SH NAME\ndurable\\-snapshotter \\- %s", roff(strings.ToLower(about[:1])+about[1:]))
	p(".SH SYNOPSIS\n.B durable\\-snapshotter\n.I VERB\n.RI [ flags ]")
	p(".SH DESCRIPTION\n%s", roff(u.about))
	p(".SH VERBS")
	for _, c := range u.calls {
		p(".TP\n.B %s\n%s", roff(c.synopsis), roff(c.text))
	}
	p(".SH OPTIONS\nOf every verb:")
	for _, o := range u.common {
		p(".TP\n.BI \\-\\-%s \" %s\"\n%s", roff(o.name), o.value, roff(o.text))
	}
	p(".SH EXIT STATUS\n%s", roff(u.status))
	p(".SH FILES")
	for _, f := range [][2]string{
		{"/etc/durable-snapshotter/config.toml", "Configuration. Without it the defaults hold; durable-snapshotter config default prints them."},
		{"/var/lib/durable-snapshotter", "Snapshots and metadata.db, unless configured otherwise. No package removes it."},
		{"/run/durable-snapshotter/durable-snapshotter.sock", "Where containerd connects."},
		{"/run/durable-snapshotter/admin.sock", "HTTP for operators: health, metrics, and what is on record."},
	} {
		p(".TP\n.I %s\n%s", roff(f[0]), roff(f[1]))
	}
	p(".SH EXAMPLES\n.EX\n%s\n.EE", roff(u.example))
	p(".SH SEE ALSO\n.BR containerd (8),\n.BR systemctl (1)")
	return b.String()
}
