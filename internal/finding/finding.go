// Package finding describes the differences that a verification finds between a layer
// and what it must be. The journal and the reports keep them.
package finding

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// Finding is a difference between a layer's tree and its seal, its content digests,
// its blob, or the layers below it. The journal keeps it as JSON.
type Finding struct {
	Path string `json:"path"`           // relative to the tree, "." for its root
	What string `json:"what"`           // missing, extra, unreadable, or the mtree keyword that differs
	Want string `json:"want,omitempty"` // by the seal
	Have string `json:"have,omitempty"` // on disk

	// Below: the difference is not one from the tree's own seal. Want is what the
	// layers below require, and Have what the seal has.
	Below bool `json:"below,omitempty"`
}

func (f Finding) String() string {
	if f.Below {
		return fmt.Sprintf("%s: %s is %s, by the layers below it must be %s", f.Path, f.What, orNone(f.Have), orNone(f.Want))
	}
	switch f.What {
	case "missing", "extra":
		return fmt.Sprintf("%s: %s", f.Path, f.What)
	case "unreadable":
		return fmt.Sprintf("%s: unreadable: %s", f.Path, f.Have)
	}
	return fmt.Sprintf("%s: %s was %s, is %s", f.Path, f.What, orNone(f.Want), orNone(f.Have))
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// Unreadable is the finding of a file that cannot be read. err wraps the error number.
func Unreadable(path string, err error) *Finding {
	var errno unix.Errno
	errors.As(err, &errno) // tree.Unreadable has seen it
	return &Finding{Path: path, What: "unreadable", Have: errno.Error()}
}

// Merge adds findings to those of a deeper verification, up to most in all.
func Merge(deeper, more []Finding, most int) []Finding {
	all := slices.Clone(deeper)
	for _, f := range more {
		if len(all) < most && !slices.Contains(all, f) {
			all = append(all, f)
		}
	}
	return all
}

// Texts are the first findings, for the log.
func Texts(findings []Finding) (texts []string) {
	for _, f := range findings[:min(len(findings), 5)] {
		texts = append(texts, f.String())
	}
	return texts
}
