// Package overlayutil holds facts about overlayfs: the names of its extended
// attributes, how it finds an entry in a stack of layers, the grammar of its
// mount options, and what the running kernel does where kernels differ. It makes no
// decisions.
//
// # Attributes
//
// Overlay stores its metadata in extended attributes of the layers' files,
// below "trusted.overlay.", or below "user.overlay." when it is mounted with
// userxattr (since Linux 5.11; fs/overlayfs/overlayfs.h, enum ovl_xattr). Each
// kind of mount treats the attributes of the other kind as ordinary ones: it shows them,
// and copies them up with their file.
//
//	opaque    of a directory: "y", lower directories of that name are hidden;
//	          "x" (since Linux 6.8), not hidden, but the directory may hold
//	          whiteouts made of an attribute. Any other value is ignored.
//	whiteout  of an empty regular file in an "x" directory: a whiteout (6.7)
//	redirect  of a directory: where its lower directory is, after a rename
//	metacopy  of a file: the content is in a lower layer
//	origin, impure, nlink, upper, uuid, protattr: the kernel's own bookkeeping
//
// The usual whiteout is a character device 0:0. The attributes of a layer's
// root are ignored: an opaque root hides nothing (Linux 6.18).
//
// # What a kernel does
//
// Features are determined by trying: real overlays are mounted and inspected. Versions
// are not compared, because distributions backport.
package overlayutil
