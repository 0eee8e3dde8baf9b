package kit

import (
	"context"
	"strings"
	"testing"
)

// TestPrints: only commands that do nothing but print are run again.
func TestPrints(t *testing.T) {
	for command, want := range map[string]bool{
		"--namespace n run --rm --snapshotter durable ref id":                             true,
		"task exec --exec-id x id /bin/guest cat /file":                                   true,
		"task exec --exec-id x id /bin/guest write /file text":                            false,
		"run --detach --snapshotter durable ref id":                                       false,
		"run --rm --log-uri file:///log --snapshotter durable ref id /bin/witness/writes": false,
		"run -d ref id": false,
		"task ls":       false,
		"image rm ref":  false,
	} {
		if got := prints(strings.Fields(command)); got != want {
			t.Errorf("%s: %t", command, got)
		}
	}
}

// TestOwnPlaces: two containerds run containers of one name in one namespace at the same time.
func TestOwnPlaces(t *testing.T) {
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	b, err := Build(t.Context())
	must(err)
	reg, err := StartRegistry(t.TempDir())
	must(err)
	t.Cleanup(func() { must(reg.Close()) })
	img, err := Runnable(t.Context())
	must(err)
	pushed, err := Push(t.Context(), reg, "app", img)
	must(err)
	for range 2 {
		c, err := StartContainerd(t.Context(), ContainerdOptions{Binaries: b, Dir: t.TempDir()})
		must(err)
		t.Cleanup(func() { must(c.Stop()) })
		_, err = c.Ctr(t.Context(), "image", "pull", "--plain-http", pushed.Ref)
		must(err)
		_, err = c.Ctr(t.Context(), "run", "--detach", pushed.Ref, "one-name", "/bin/guest", "wait")
		must(err)
		t.Cleanup(func() {
			_, err := c.Ctr(context.WithoutCancel(t.Context()), "task", "rm", "--force", "one-name")
			must(err)
		})
	}
}
