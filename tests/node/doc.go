// Package node shows that pods come back after a power cut, under a real kubelet.
// A node has a containerd with its CRI plugin, the daemon and the kubelet, and its
// disk is a loop device; three static pods run images that share layers. The power
// is cut, or a layer is damaged while the machine is down, the registry is gone,
// and everything starts again: on the built-in overlayfs the pods stay away, on
// durable they run, and the registry gets no request.
//
// The kubelet stands alone: no API server, no network of pods, no Services. The
// first build takes ten minutes and more, so that the tests are skipped unless
// DURABLE_TEST_KUBELET is set:
//
//	make test-node
//	DURABLE_TEST_KUBELET=1 go test -v ./node -run 'TestPowerCut/Never/durable'
package node
