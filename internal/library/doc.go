// Package library reads, through containerd's API, the images of a namespace and their
// blobs in containerd's content store, and verifies blobs against their digests.
//
// Both containerd's own records (labels of blobs) and the documents (index, manifest,
// config) describe an image; each is used where the other is missing or bad. Every
// document is compared with its digest before it is used. Nothing is changed.
package library
