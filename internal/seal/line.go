package seal

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
	"github.com/durable-snapshotter/durable-snapshotter/overlayutil"
)

// longValue is the length above which a line has the digest of an attribute instead of its
// value: a Commit that writes gigabytes of values blocks containerd.
const longValue = 1 << 10

// appendLine appends the entry's line of a seal, with its line break.
func (e *Entry) appendLine(b []byte) []byte {
	b = mtree.AppendPath(b, e.Path)
	st := &e.Stat
	b = append(append(b, " type="...), mtree.TypeName(e.Type())...)
	b = strconv.AppendUint(append(b, " mode=0"...), uint64(st.Mode&^unix.S_IFMT), 8)
	b = strconv.AppendUint(append(b, " uid="...), uint64(st.Uid), 10)
	b = strconv.AppendUint(append(b, " gid="...), uint64(st.Gid), 10)
	switch e.Type() {
	case unix.S_IFREG:
		// No link count: names outside the layer are in it too.
		b = strconv.AppendInt(append(b, " size="...), st.Size, 10)
	case unix.S_IFLNK:
		b = mtree.AppendVis(append(b, " link="...), e.Link)
	case unix.S_IFCHR, unix.S_IFBLK:
		b = fmt.Appendf(b, " device=native,%d,%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	}
	b = strconv.AppendInt(append(b, " time="...), int64(st.Mtim.Sec), 10)
	b = append(b, '.')
	nsec := strconv.FormatInt(int64(st.Mtim.Nsec), 10)
	b = append(append(b, "000000000"[len(nsec):]...), nsec...)
	for _, x := range e.Xattrs {
		if !recorded(x.Name) {
			continue
		}
		if len(x.Value) > longValue {
			sum := sha256.Sum256([]byte(x.Value))
			b = append(mtree.AppendVis(append(b, " xattrdigest."...), x.Name), '=')
			b = hex.AppendEncode(b, sum[:])
			continue
		}
		b = append(mtree.AppendVis(append(b, " xattr."...), x.Name), '=')
		b = base64.StdEncoding.AppendEncode(b, []byte(x.Value))
	}
	return append(b, '\n')
}

// fields are those of a line: keywords first, then attributes in the order of
// their names.
type fields struct {
	words [12][2]string // keywords and values; a line has nine of them at most
	n     int
	rest  []byte // attributes
	at    *attrField
}

func fieldsOf(line []byte) *fields {
	f := &fields{}
	_, f.rest, _ = bytes.Cut(line, []byte(" "))
	for len(f.rest) > 0 && !bytes.HasPrefix(f.rest, []byte("xattr")) {
		var field []byte
		field, f.rest, _ = bytes.Cut(f.rest, []byte(" "))
		key, value, _ := bytes.Cut(field, []byte("="))
		if f.n < len(f.words) {
			f.words[f.n] = [2]string{string(key), string(value)}
			f.n++
		}
	}
	f.next()
	return f
}

func (f *fields) get(key string) string {
	for _, w := range f.words[:f.n] {
		if w[0] == key {
			return w[1]
		}
	}
	return ""
}

// untimed reports an entry whose time is no part of what the layer means.
func (f *fields) untimed() bool {
	return f.get("type") == "dir" || f.get("type") == "char" && f.get("device") == "native,0,0"
}

func seconds(time string) string {
	s, _, _ := strings.Cut(time, ".")
	return s
}

// attr is the next attribute, nil when there is none.
func (f *fields) attr() *attrField { return f.at }

// next goes on to the next attribute.
func (f *fields) next() {
	f.at = nil
	for len(f.rest) > 0 && f.at == nil {
		var field []byte
		field, f.rest, _ = bytes.Cut(f.rest, []byte(" "))
		f.at = parseAttr(field)
	}
}

// attrField is an attribute in a line: its value in base64, or the SHA-256 of its
// value in hex.
type attrField struct {
	name   string
	value  []byte
	digest bool
}

func parseAttr(field []byte) *attrField {
	key, value, _ := bytes.Cut(field, []byte("="))
	a := &attrField{value: value}
	name, ok := bytes.CutPrefix(key, []byte("xattr."))
	if !ok {
		if name, ok = bytes.CutPrefix(key, []byte("xattrdigest.")); !ok {
			return nil
		}
		a.digest = true
	}
	a.name = string(name)
	if plain, err := mtree.Unvis(a.name); err == nil {
		a.name = plain
	}
	return a
}

// sum is the SHA-256 of the value in hex.
func (a *attrField) sum() string {
	if a.digest {
		return string(a.value)
	}
	value, err := base64.StdEncoding.AppendDecode(nil, a.value)
	if err != nil {
		return ""
	}
	sum := sha256.Sum256(value)
	return hex.EncodeToString(sum[:])
}

func (a *attrField) equal(b *attrField) bool {
	if a.digest == b.digest {
		return bytes.Equal(a.value, b.value)
	}
	return a.sum() == b.sum()
}

// text is the value for a message: quoted, or the digest of a long one.
func (a *attrField) text() string {
	if !a.digest && base64.StdEncoding.DecodedLen(len(a.value)) <= longValue+2 {
		if value, err := base64.StdEncoding.AppendDecode(nil, a.value); err == nil {
			return strconv.Quote(string(value))
		}
	}
	return "sha256:" + a.sum()
}

// opaque is the value of the opaque mark.
func (f *fields) opaque(space overlayutil.Space) string {
	value, _ := f.mark(space, overlayutil.AttrOpaque)
	return value
}

// mark is the value of an attribute of overlayfs, whose values are short. It uses
// the attributes up to it.
func (f *fields) mark(space overlayutil.Space, name string) (value string, set bool) {
	for x := f.attr(); x != nil && x.name <= string(space)+name; x = f.attr() {
		if x.name == string(space)+name {
			b, err := base64.StdEncoding.AppendDecode(nil, x.value)
			if err != nil || x.digest {
				return "", true
			}
			return string(b), true
		}
		f.next()
	}
	return "", false
}

// eachLine calls fn for the lines of a seal until it returns false. Its error
// wraps mtree.ErrUnsealed unless the whole text has the given digest: what fn has made
// of the lines counts only when there is no error.
func eachLine(file, digest string, fn func(rel string, line []byte) (more bool, err error)) error {
	r, err := mtree.Open(file)
	if err != nil {
		return err
	}
	defer r.Close()
	var bad error
	for more := true; more && bad == nil && r.Next(); r.Take() {
		var rel string
		if rel, bad = mtree.PathOf(r.Line()); bad == nil {
			more, bad = fn(rel, r.Line())
		}
	}
	// Of a seal that is not the one that was written, no line means anything.
	if err := r.Check(digest); err != nil {
		return err
	}
	return bad
}
