package node

import (
	"os"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// TestTornRecord documents what a kubelet does whose record of a pulled image is
// empty, as a power cut leaves it: it does not sync its records. It pulls the image
// again, under the laxest policy, too, and the pod stays away while the registry
// is gone, with all layers whole. Without the record it takes the image for preloaded.
func TestTornRecord(t *testing.T) {
	n := newNode(t, options{snapshotter: durable, policy: ifNotPresent, kubelet: "imagePullCredentialsVerificationPolicy: NeverVerify\n"})
	check(t, n.kubelet.Start(t.Context()))
	n.run(t)
	before := n.trees(t)
	n.stop(t)
	check(t, n.Reboot())
	_, records, err := n.kubelet.Records()
	check(t, err)
	if len(records) != len(podNames) {
		t.Fatalf("the kubelet has the records %q, want one of each of %d images", records, len(podNames))
	}
	check(t, os.Truncate(records[0], 0))

	n.Registry.Silence()
	requests := n.Registry.Requests()
	n.start(t)
	text, _ := n.settle(t)
	t.Logf("one record is empty:\n%s", text)
	pods := must[map[string]kit.PodState](t)(n.kubelet.Pods(t.Context()))
	away := 0
	for _, p := range pods {
		if !p.Running {
			away++
		}
	}
	if away != 1 || n.Registry.Requests() == requests {
		t.Errorf("%d pods stay away and the registry got %d requests: the kubelet has changed, and docs/design.md is to follow", away, n.Registry.Requests()-requests)
	}

	check(t, n.kubelet.Stop())
	n.forgetTorn(t)
	requests = n.Registry.Requests()
	check(t, n.kubelet.Start(t.Context()))
	if text, all := n.settle(t); !all {
		t.Errorf("pods stay away without the empty record:\n%s", text)
	}
	if r := n.Registry.Requests() - requests; r != 0 {
		t.Errorf("%d requests to the registry without the empty record, want none", r)
	}
	n.whole(t, before)
}
