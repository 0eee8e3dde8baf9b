package overlayutil

import "strings"

// Options are the options of an overlay mount, as a list with one option per
// item: containerd's form.
type Options struct {
	Lower []string // topmost first; nil without lower directories
	Apart bool     // each lower directory is an option of its own, lowerdir+
	Upper string   // "" for a read-only mount
	Work  string
	Rest  []string // everything else, as it stands, in order
}

// ParseOptions reads mount options. In lowerdir a colon separates directories
// and a backslash quotes the character after it
// (Documentation/filesystems/overlayfs.rst, "Multiple lower layers"). Of an
// option that comes twice the last one counts, as in the kernel.
func ParseOptions(options []string) Options {
	var o Options
	for _, option := range options {
		key, value, _ := strings.Cut(option, "=")
		switch key {
		case "lowerdir":
			o.Lower = splitLower(value)
		case "lowerdir+": // nothing is quoted here
			o.Lower, o.Apart = append(o.Lower, value), true
		case "upperdir":
			o.Upper = value
		case "workdir":
			o.Work = value
		default:
			o.Rest = append(o.Rest, option)
		}
	}
	return o
}

// Strings is the inverse of ParseOptions, in containerd's order.
func (o Options) Strings() []string {
	var out []string
	if o.Work != "" {
		out = append(out, "workdir="+o.Work)
	}
	if o.Upper != "" {
		out = append(out, "upperdir="+o.Upper)
	}
	if o.Apart {
		for _, dir := range o.Lower {
			out = append(out, "lowerdir+="+dir)
		}
	} else if o.Lower != nil {
		quoted := make([]string, len(o.Lower))
		for i, dir := range o.Lower {
			quoted[i] = quoteLower.Replace(dir)
		}
		out = append(out, "lowerdir="+strings.Join(quoted, ":"))
	}
	return append(out, o.Rest...)
}

var quoteLower = strings.NewReplacer(`\`, `\\`, ":", `\:`)

func splitLower(s string) []string {
	var (
		dirs   []string
		dir    strings.Builder
		quoted bool
	)
	for i := range len(s) {
		switch c := s[i]; {
		case quoted:
			dir.WriteByte(c)
			quoted = false
		case c == '\\':
			quoted = true
		case c == ':':
			dirs = append(dirs, dir.String())
			dir.Reset()
		default:
			dir.WriteByte(c)
		}
	}
	return append(dirs, dir.String())
}
