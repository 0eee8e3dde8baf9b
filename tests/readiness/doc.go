// Package readiness shows what containerd does with a snapshotter that reports "this
// layer is not whole", and that an image whose layers and blobs are both bad is
// dropped so that the next pull is clean.
//
// The first part measures. Between a real containerd with its CRI plugin and the
// daemon stands a proxy that passes every call on and answers for chosen layers
// with an error. What users, the kubelet and ctr then see is compared with
// testdata/answers.txt, so that an upgrade of containerd that changes one of
// these outcomes is noticed:
//
//	go test ./readiness -run Answers
//	go test ./readiness -run Answers -update    writes the file anew
//
// The second part breaks layers and blobs on disk and calls package repull.
//
// The third part has pulls and drops die half-way, by kill -9 of
// either daemon or of the client, and images removed while the daemon is down: what the
// two databases record of a layer must agree again, and nothing may be left.
package readiness
