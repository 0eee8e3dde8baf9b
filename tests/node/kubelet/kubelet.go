//go:build tools

// Package kubelet is a module of its own from which the tests build the kubelet. The
// module k8s.io/kubernetes replaces its staging modules by directories of its
// repository, which the module proxy does not have, so that no module that
// requires it builds without the replacements of this go.mod. The tests' own
// module stays free of its 200 dependencies.
package kubelet

import _ "k8s.io/kubernetes/cmd/kubelet"
