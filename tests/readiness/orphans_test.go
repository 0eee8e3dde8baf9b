package readiness

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestOrphans: an image was removed while containerd ran without the snapshotter, and
// its snapshots have stayed. The verb finds them, and removes them and nothing else,
// with the daemon running or not; without containerd's answer it does nothing.
func TestOrphans(t *testing.T) {
	t.Parallel()
	for _, live := range []bool{true, false} {
		t.Run("daemon="+strconv.FormatBool(live), func(t *testing.T) {
			s := newOrphanage(t)
			before := s.rows(t)
			s.without(t, func() {
				if out, code := s.verb(t, "--apply"); code != 1 || !strings.Contains(out, "containerd does not know this snapshotter") {
					t.Errorf("without the plugin: exit %d, %s", code, out)
				}
				s.ctr(t, s.one, "images", "rm", "--sync", s.gone.Ref)
			})
			if rows := s.rows(t); !slices.Equal(rows, before) {
				t.Fatalf("rows %q, before the removal %q", rows, before)
			}
			sn := must[snapshots.Snapshotter](t)(s.Daemon.Snapshotter())
			defer sn.Close()
			// What a Commit that containerd has forgotten leaves.
			stale := s.one + "/998/" + s.kept.ChainIDs[0].String()
			must[[]mount.Mount](t)(sn.Prepare(t.Context(), s.one+"/997/extract-1-a "+s.kept.ChainIDs[0].String(), ""))
			check(t, sn.Commit(t.Context(), stale, s.one+"/997/extract-1-a "+s.kept.ChainIDs[0].String()))
			time.Sleep(11 * time.Second) // younger ones may be in flight

			want := []string{s.name(before, s.gone.ChainIDs[0].String()), s.name(before, s.gone.ChainIDs[1].String())}
			kept := slices.DeleteFunc(slices.Clone(before), func(n string) bool { return slices.Contains(want, n) })
			if live {
				want = append(want, stale)
			} else {
				// Only the daemon's own answer, through containerd, shows which of two
				// rows is meant.
				kept = append(kept, stale)
				check(t, s.Daemon.Stop())
			}
			slices.Sort(want)
			slices.Sort(kept)

			if found := s.list(t, 1); !slices.Equal(found, want) {
				t.Fatalf("found %q, want %q", found, want)
			}
			check(t, s.Containerd.Stop())
			if out, code := s.verb(t, "--apply"); code != 1 {
				t.Errorf("without containerd: exit %d, %s", code, out)
			}
			check(t, s.Containerd.Start(t.Context()))
			if found := s.list(t, 1); !slices.Equal(found, want) {
				t.Fatalf("found %q, want %q", found, want)
			}

			dirs := s.directories(t)
			if out, code := s.verb(t, "--apply"); code != 0 || strings.Count(out, "  removed\n") != len(want) {
				t.Errorf("exit %d, %s", code, out)
			}
			if now := s.directories(t); now != dirs-len(want) {
				t.Errorf("%d directories, before %d", now, dirs)
			}
			if found := s.list(t, 0); len(found) > 0 {
				t.Errorf("still there: %q", found)
			}
			if !live {
				since := logged(t, s.Daemon)
				check(t, s.Daemon.Start(t.Context()))
				// The start of the daemon has containerd collect what it does not know.
				waitSettled(t, s.Daemon, since)
				kept = slices.DeleteFunc(kept, func(n string) bool { return n == stale })
				// containerd connects again within 3 s.
				waitFor(t, time.Minute, func() error {
					_, err := s.Containerd.Ctr(t.Context(), "--namespace", s.one, "snapshots", "--snapshotter", "durable", "info", s.kept.Top())
					return err
				})
			}
			if rows := s.rows(t); !slices.Equal(rows, kept) {
				t.Errorf("rows %q, want %q", rows, kept)
			}
			for _, ns := range []string{s.one, s.two} {
				if out := s.ctr(t, ns, "run", "--rm", "--snapshotter", "durable", s.kept.Ref, "after", "/bin/guest", "echo"); out == "" {
					t.Errorf("a container in namespace %s printed nothing", ns)
				}
			}
			if out := s.ctr(t, s.one, "tasks", "ls"); !strings.Contains(out, "RUNNING") {
				t.Errorf("the container does not run any more: %s", out)
			}
		})
	}
}

// TestOrphansOfOthers: containerd's garbage collection deletes what any other client has
// made with the snapshotter. Then the verb does not start one.
func TestOrphansOfOthers(t *testing.T) {
	s := newOrphanage(t)
	sn := must[snapshots.Snapshotter](t)(s.Daemon.Snapshotter())
	defer sn.Close()
	must[[]mount.Mount](t)(sn.Prepare(t.Context(), "by hand", ""))
	if out, code := s.verb(t, "--apply"); code != 1 || !strings.Contains(out, `snapshot "by hand" is of another client`) {
		t.Errorf("exit %d, %s", code, out)
	}
	if found := s.list(t, 0); len(found) > 0 {
		t.Errorf("found %q", found)
	}
}

// orphanage is a containerd without its CRI plugin, and images in two namespaces.
type orphanage struct {
	*kit.Node
	one, two   string // namespaces
	kept, gone kit.Pushed
}

func newOrphanage(t *testing.T) *orphanage {
	t.Helper()
	registry := must[*kit.Registry](t)(kit.StartRegistry(filepath.Join(scratch(t), "registry")))
	s := &orphanage{
		kept: must[kit.Pushed](t)(kit.Push(t.Context(), registry, "kept", must[kit.Image](t)(kit.Runnable(t.Context())))),
		gone: must[kit.Pushed](t)(kit.Push(t.Context(), registry, "gone", kit.Image{Cmd: []string{"/x"}, Layers: []kit.Layer{
			kit.NewLayer(kit.Gzip, kit.File("a", 0o644, "a")), kit.NewLayer(kit.Gzip, kit.File("b", 0o644, "b")),
		}})),
	}
	s.Node = kittest.StartNode(t, kit.NodeOptions{
		Registry: registry, Heals: true, Notifies: true, Containerd: kit.ContainerdOptions{Extra: onlyOnRequest},
	})
	waitSettled(t, s.Daemon, 0) // or it would find, and remove, what the tests leave
	s.one, s.two = s.Containerd.Namespace+"-one", s.Containerd.Namespace+"-two"
	for ns, imgs := range map[string][]kit.Pushed{s.one: {s.kept, s.gone}, s.two: {s.kept}} {
		for _, img := range imgs {
			s.ctr(t, ns, "images", "pull", "--plain-http", "--snapshotter", "durable", img.Ref)
		}
	}
	s.ctr(t, s.one, "run", "-d", "--snapshotter", "durable", s.kept.Ref, "running", "/bin/guest", "wait")
	t.Cleanup(func() {
		s.ctr(t, s.one, "tasks", "rm", "-f", "running")
		s.ctr(t, s.one, "containers", "rm", "running")
	})
	s.ctr(t, s.two, "snapshots", "--snapshotter", "durable", "prepare", "work", s.kept.Top())
	return s
}

func (s *orphanage) ctr(t *testing.T, namespace string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
	defer cancel()
	return must[string](t)(s.Containerd.Ctr(ctx, append([]string{"--namespace", namespace}, args...)...))
}

// without runs f while containerd runs without the snapshotter in its configuration.
func (s *orphanage) without(t *testing.T, f func()) {
	t.Helper()
	check(t, s.Containerd.Stop())
	check(t, s.Containerd.Use(nil))
	check(t, s.Containerd.Start(t.Context()))
	defer func() {
		check(t, s.Containerd.Stop())
		check(t, s.Containerd.Use(s.Daemon))
		check(t, s.Containerd.Start(t.Context()))
	}()
	f()
}

// verb runs durable-snapshotter repair --orphans.
func (s *orphanage) verb(t *testing.T, args ...string) (string, int) {
	t.Helper()
	out, stderr, code := kittest.Verb(t, s.Daemon, append([]string{"repair", "--orphans"}, args...)...)
	return out + stderr, code
}

// list returns the names that the verb lists, sorted.
func (s *orphanage) list(t *testing.T, want int) (names []string) {
	t.Helper()
	out, code := s.verb(t, "--json")
	if code != want {
		t.Errorf("exit %d, want %d: %s", code, want, out)
	}
	var found []struct{ Name string }
	if err := json.NewDecoder(strings.NewReader(out[max(0, strings.Index(out, "[")):])).Decode(&found); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, o := range found {
		names = append(names, o.Name)
	}
	slices.Sort(names)
	return names
}

func (s *orphanage) rows(t *testing.T) (names []string) {
	t.Helper()
	sn := must[snapshots.Snapshotter](t)(s.Daemon.Snapshotter())
	defer sn.Close()
	check(t, sn.Walk(t.Context(), func(_ context.Context, info snapshots.Info) error {
		names = append(names, info.Name)
		return nil
	}))
	slices.Sort(names)
	return names
}

func (s *orphanage) name(rows []string, key string) string {
	return rows[slices.IndexFunc(rows, func(n string) bool { return strings.HasPrefix(n, s.one+"/") && strings.HasSuffix(n, "/"+key) })]
}

func (s *orphanage) directories(t *testing.T) int {
	t.Helper()
	return len(must[[]os.DirEntry](t)(os.ReadDir(filepath.Join(s.Daemon.Root, "snapshots"))))
}
