package api

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestRun runs containers from an image under the daemon, and reads in them what
// the layers put on top of each other.
func TestRun(t *testing.T) {
	s := newStack(t, kit.NodeOptions{})
	img := images.Get(t, "runnable")
	s.pull(t, "transfer", "durable", img)
	for _, c := range []struct {
		name string
		args []string
		want string
	}{
		{"the image's own command", nil, "hello from the image\n"},
		{"a file of the top layer", []string{"/bin/guest", "cat", "/etc/motd"}, "third layer\n"},
		{"a hard link of the middle layer", []string{"/bin/again", "echo", "linked"}, "linked\n"},
		{"a file of its own", []string{"/bin/guest", "write", "/tmp/new", "text"}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			args := append([]string{"run", "--rm", "--snapshotter", "durable", img.Ref, "once"}, c.args...)
			if got := s.ctr(t, args...); got != c.want {
				t.Errorf("container printed %q, want %q", got, c.want)
			}
		})
	}
	// --rm removed the containers' own snapshots with them.
	s.waitLayerDirs(t, len(img.Layers))
}

// TestKillWhileRunning kills the daemon under running containers. They have
// their mounts and need no daemon; what is new waits for the daemon to be back.
func TestKillWhileRunning(t *testing.T) {
	s := newStack(t, kit.NodeOptions{})
	img := images.Get(t, "runnable")
	s.pull(t, "transfer", "durable", img)
	s.runDetached(t, img.Ref, "lasting")
	s.exec(t, "lasting", "write", "/tmp/before", "written before the kill")

	if err := s.Daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	s.wantRunning(t, "lasting")
	s.exec(t, "lasting", "write", "/tmp/between", "written while it was dead")
	if got := s.exec(t, "lasting", "cat", "/etc/motd"); got != "third layer\n" {
		t.Errorf("a file of the image, while the daemon is dead: %q", got)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	if out, err := s.Containerd.Ctr(ctx, "run", "--rm", "--snapshotter", "durable", img.Ref, "too-early"); err == nil {
		t.Errorf("a container started without the daemon: %q", out)
	}

	if err := s.Daemon.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.wantRunning(t, "lasting")
	for file, want := range map[string]string{"/tmp/before": "written before the kill", "/tmp/between": "written while it was dead"} {
		if got := s.exec(t, "lasting", "cat", file); got != want {
			t.Errorf("%s after the daemon came back: %q, want %q", file, got, want)
		}
	}
	s.eventually(t, func() (string, error) {
		return s.Containerd.Ctr(t.Context(), "run", "--rm", "--snapshotter", "durable", img.Ref, "new")
	}, "hello from the image\n")
}

// runDetached starts a container that waits, and ends it after the test.
func (s *stack) runDetached(t *testing.T, ref, id string) {
	t.Helper()
	s.ctr(t, "run", "-d", "--snapshotter", "durable", ref, id, "/bin/guest", "wait")
	t.Cleanup(func() {
		ctx := context.Background() // the test's own has ended
		if _, err := s.Containerd.Ctr(ctx, "task", "rm", "--force", id); err != nil {
			t.Error(err)
		}
		if _, err := s.Containerd.Ctr(ctx, "container", "rm", id); err != nil {
			t.Error(err)
		}
	})
}

// exec runs the guest program in a running container.
func (s *stack) exec(t *testing.T, id string, args ...string) string {
	t.Helper()
	return kittest.Exec(t, s.Node, id, args...)
}

func (s *stack) wantRunning(t *testing.T, id string) {
	t.Helper()
	for line := range strings.Lines(s.ctr(t, "task", "ls")) {
		if fields := strings.Fields(line); len(fields) == 3 && fields[0] == id {
			if fields[2] != "RUNNING" {
				t.Fatalf("container %s is %s", id, fields[2])
			}
			return
		}
	}
	t.Fatalf("container %s is not in the list of tasks", id)
}

// reconnected waits until containerd has found the daemon again after a restart.
func (s *stack) reconnected(t *testing.T) {
	t.Helper()
	s.eventually(t, func() (string, error) {
		_, err := s.Containerd.Ctr(t.Context(), "snapshot", "--snapshotter", "durable", "ls")
		return "", err
	}, "")
}

// eventually repeats a command until it prints want. containerd waits up to 3 s
// before it connects again to a proxy plugin that was gone.
func (s *stack) eventually(t *testing.T, command func() (string, error), want string) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
		got, err := command()
		if err == nil && got == want {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("printed %q, want %q (%v)", got, want, err)
		}
	}
}
