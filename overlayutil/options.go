package overlayutil

import (
	"os"
	"path/filepath"
	"strings"
)

// Options are the options of an overlay mount, as a list with one option per
// item: containerd's form.
type Options struct {
	Lower []string // topmost first; nil without lower directories
	Upper string   // "" for a read-only mount
	Work  string
	Rest  []string // everything else, as it stands, in order

	// Quoted writes the last element of each lower directory with a backslash
	// before it. To the kernel that is the same path; a reader that does not
	// unquote, as containerd's applier (getOverlayPath in
	// core/diff/apply/apply_linux.go), gets one that does not exist. The
	// directory that the paths have in common stays as it is: containerd's mount
	// changes into that when the options are longer than a page
	// (compactLowerdirOption in core/mount/mount_linux.go). ParseOptions does
	// not set it.
	Quoted bool
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
	if o.Lower != nil {
		quoted := make([]string, len(o.Lower))
		for i, dir := range o.Lower {
			quoted[i] = quoteLower.Replace(dir)
			start := strings.LastIndexByte(quoted[i], '/') + 1
			// With no last element the backslash would quote the separator.
			if last := quoted[i][start:]; o.Quoted && last != "" && !strings.HasPrefix(last, `\`) {
				quoted[i] = quoted[i][:start] + `\` + last
			}
		}
		out = append(out, "lowerdir="+strings.Join(quoted, ":"))
	}
	return append(out, o.Rest...)
}

// FitsQuoted reports whether containerd can mount with Quoted options: whether
// they fit into the page that mount(2) takes, with the lower directories
// relative to base, the directory they have in common.
func (o Options) FitsQuoted(base string) bool {
	o.Quoted = true
	o.Lower = append([]string(nil), o.Lower...)
	for i, dir := range o.Lower {
		if rel, err := filepath.Rel(base, dir); err == nil {
			o.Lower[i] = rel
		}
	}
	return len(strings.Join(o.Strings(), ",")) < os.Getpagesize()
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
