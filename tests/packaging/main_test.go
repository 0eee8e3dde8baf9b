package packaging

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

var (
	images kittest.Images
	check  = kittest.Check
	in     = kittest.In
)

func must[T any](t testing.TB) func(T, error) T { return kittest.Must[T](t) }

func TestMain(m *testing.M) { images.Main(m) }

// packagingDir is the directory under test, from this one.
const packagingDir = "../../packaging"

// onMachines skips a test that boots machines or builds a release, unless it was
// requested: that takes minutes.
func onMachines(t *testing.T) {
	if os.Getenv("DURABLE_TEST_PACKAGES") == "" {
		t.Skip("takes minutes: make test-packages")
	}
}

// command runs a program with further environment and returns its standard output.
func command(t testing.TB, stdin string, env []string, argv ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), argv[0], argv[1:]...)
	cmd.Stdin = strings.NewReader(stdin)
	cmd.Env = append(os.Environ(), env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("%q: %v: %s%s", argv, err, errs.Bytes(), out.Bytes())
	}
	return out.String()
}

// needs skips the test when a program is not installed.
func needs(t *testing.T, program string) {
	if _, err := exec.LookPath(program); err != nil {
		t.Skipf("%s is not installed", program)
	}
}

// install installs below PREFIX of a new directory, as make install does.
func install(t *testing.T, prefix string) (root string) {
	t.Helper()
	root = kittest.Scratch(t)
	env := []string{"BIN=" + must[string](t)(filepath.Abs(kittest.Binaries(t).Daemon)), "DESTDIR=" + root, "PREFIX=" + prefix}
	command(t, "", env, packagingDir+"/install.sh", "install")
	return root
}

// release builds a release for this architecture.
func release(t *testing.T, version string) (dir string) {
	t.Helper()
	dir = kittest.Scratch(t)
	command(t, "", []string{
		"VERSION=" + version, "REVISION=tested", "SOURCE_DATE_EPOCH=1700000000", "OUT=" + dir, "ARCHES=" + runtime.GOARCH,
	}, packagingDir+"/dist.sh")
	return dir
}

// the finds the one file that matches a pattern.
func the(t testing.TB, pattern string) string {
	t.Helper()
	found := must[[]string](t)(filepath.Glob(pattern))
	if len(found) != 1 {
		t.Fatalf("%s: %q, want one", pattern, found)
	}
	return found[0]
}

// spared verifies that the kernel ends other processes first when memory is short, unless root may
// not set that here (CAP_SYS_RESOURCE).
func spared(t *testing.T, m *kit.Machine, pid int) {
	t.Helper()
	if err := exec.Command("sh", "-c", "echo -999 >/proc/self/oom_score_adj").Run(); err != nil {
		t.Logf("oom_score_adj is not verified: it cannot be set here: %v", err)
		return
	}
	if got := in(t, m, "cat", fmt.Sprintf("/proc/%d/oom_score_adj", pid)); got != "-999\n" {
		t.Errorf("oom_score_adj of process %d is %q", pid, got)
	}
}
