package verbs

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// get requests a path of a daemon's admin.sock.
func get(t *testing.T, d *kit.Daemon, path string) (body []byte, status int) {
	t.Helper()
	return fetched(t, kit.AdminClient(d.Address), "http://admin"+path)
}

func fetched(t *testing.T, client *http.Client, url string) (body []byte, status int) {
	t.Helper()
	resp := kittest.Must[*http.Response](t)(client.Get(url))
	defer resp.Body.Close()
	return kittest.Must[[]byte](t)(io.ReadAll(resp.Body)), resp.StatusCode
}

// metrics are those of a daemon: the value of each by its name, and its labels.
func metrics(t *testing.T, text []byte) map[string]float64 {
	t.Helper()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]float64{}
	for name, f := range families {
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			key := name
			if len(labels) > 0 {
				key += "{" + strings.Join(labels, ",") + "}"
			}
			switch f.GetType() {
			case dto.MetricType_COUNTER:
				found[key] = m.GetCounter().GetValue()
			case dto.MetricType_GAUGE:
				found[key] = m.GetGauge().GetValue()
			case dto.MetricType_HISTOGRAM:
				found[key] = float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return found
}

// TestMetrics: the metrics count what has happened, their names and texts follow Prometheus, and
// docs/operations.md has all of them.
func TestMetrics(t *testing.T) {
	l := kittest.Must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	address := l.Addr().String()
	kittest.Check(t, l.Close())
	disk := newDisk(t, kit.DiskOptions{})
	d := kittest.StartDaemon(t, kit.DaemonOptions{Dir: disk.Path("durable"), RunDir: scratch(t), Config: fmt.Sprintf("[admin]\nmetrics_address = '%s'\n", address)})
	kittest.MakeLayer(t, d, "one")
	kittest.MakeLayer(t, d, "two")
	sn := kittest.Connect(t, d)
	if err := sn.Commit(t.Context(), "three", "no such key"); err == nil {
		t.Fatal("a commit without a snapshot succeeds")
	}
	id := kittest.Inspect(t, d).Snapshots[0].ID
	kittest.Check(t, os.Chmod(d.LayerDir(id), 0o700))
	if _, stderr, _ := kittest.Verb(t, d, "repair", "--apply"); strings.Contains(stderr, "panic") {
		t.Fatal(stderr)
	}

	text, status := fetched(t, http.DefaultClient, "http://"+address+"/metrics")
	if status != http.StatusOK {
		t.Fatalf("status %d over TCP", status)
	}
	if _, status := fetched(t, http.DefaultClient, "http://"+address+"/v1/snapshots"); status != http.StatusNotFound {
		t.Errorf("over TCP there is more than metrics: status %d", status)
	}
	got := metrics(t, text)
	const p = "durable_snapshotter_"
	for name, want := range map[string]float64{
		p + "commits_total{result=ok}":                                     2,
		p + "commits_total{result=refused}":                                1,
		p + "commit_duration_seconds":                                      3,
		p + "commit_phase_duration_seconds{phase=walk}":                    2,
		p + "commit_phase_duration_seconds{phase=sync}":                    2,
		p + "commit_phase_duration_seconds{phase=transaction}":             2,
		p + "snapshots{kind=committed}":                                    2,
		p + "layers{state=ready}":                                          1,
		p + "layers{state=damaged}":                                        1,
		p + "journal_entries{kind=committed}":                              2,
		p + "verifications_total{depth=metadata,result=ok}":                1,
		p + "heals_total{result=error}":                                    1,
		p + "sync_errors_total":                                            0,
		p + "filesystem_writable":                                          1,
		p + "last_shutdown_clean":                                          1,
		p + "mending_stopped":                                              0,
		"grpc_server_handled_total{grpc_code=OK,grpc_method=Commit}":       2,
		"grpc_server_handled_total{grpc_code=NotFound,grpc_method=Commit}": 1,
	} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s = %v (present: %v), want %v", name, v, ok, want)
		}
	}
	for _, name := range []string{"verifications_total{depth=metadata,result=damaged}", "metadata_db_bytes", "filesystem_size_bytes", "filesystem_avail_bytes", "commit_bytes_total", "commit_inodes_total"} {
		if got[p+name] == 0 {
			t.Errorf("%s%s is 0", p, name)
		}
	}

	problems, err := promlint.New(bytes.NewReader(text)).Lint()
	kittest.Check(t, err)
	for _, problem := range problems {
		t.Errorf("%s: %s", problem.Metric, problem.Text)
	}
	doc := string(kittest.Must[[]byte](t)(os.ReadFile("../../docs/operations.md")))
	for line := range strings.Lines(string(text)) {
		part := strings.SplitN(strings.TrimSpace(line), " ", 4)
		if len(part) < 4 || part[1] != "HELP" || strings.HasPrefix(part[2], "go_") || strings.HasPrefix(part[2], "process_") {
			continue
		}
		if row := "| `" + part[2] + "` |"; !strings.Contains(doc, row) || !strings.Contains(doc, part[3]) {
			t.Errorf("docs/operations.md lacks the row of %s: %s", part[2], part[3])
		}
	}
}

// TestMetricsWithoutDatabase: when the database cannot be read, the metrics that need it are
// missing, and all others are there.
func TestMetricsWithoutDatabase(t *testing.T) {
	disk := newDisk(t, kit.DiskOptions{})
	d := kittest.StartDaemon(t, kit.DaemonOptions{Dir: disk.Path("durable"), RunDir: scratch(t)})
	kittest.MakeLayer(t, d, "layer")
	read := func() map[string]float64 {
		t.Helper()
		text, status := get(t, d, "/metrics")
		if status != http.StatusOK {
			t.Fatalf("status %d: %s", status, text)
		}
		return metrics(t, text)
	}
	const layers = "durable_snapshotter_layers{state=ready}"
	before := read()
	if before[layers] != 1 {
		t.Fatalf("%s = %v", layers, before[layers])
	}
	// bbolt reads a mapping: behind the end of the file that is SIGBUS, as on a disk that
	// cannot read (mmap(2)). The two pages that are left are what begins a transaction.
	kittest.Check(t, os.Truncate(filepath.Join(d.Root, "metadata.db"), 2*4096))
	after := read()
	for name := range before {
		lost := false
		for _, of := range []string{"layers{", "snapshots{", "journal_entries{", "mending_stopped"} {
			lost = lost || strings.HasPrefix(name, "durable_snapshotter_"+of)
		}
		if _, ok := after[name]; ok == lost {
			t.Errorf("%s is there: %v", name, ok)
		}
	}
	if after["durable_snapshotter_commits_total{result=ok}"] != 1 {
		t.Errorf("%v", after)
	}
}

// TestAdminPaths: health, readiness and records over admin.sock, which belongs to root alone.
func TestAdminPaths(t *testing.T) {
	disk := newDisk(t, kit.DiskOptions{})
	d := kittest.StartDaemon(t, kit.DaemonOptions{Dir: disk.Path("durable"), RunDir: scratch(t), Config: "[admin]\npprof = true\n"})
	kittest.MakeLayer(t, d, "layer")
	for path, want := range map[string]string{"/healthz": "ok\n", "/readyz": "ok\n", "/debug/pprof/cmdline": "serve"} {
		if body, status := get(t, d, path); status != http.StatusOK || !strings.Contains(string(body), want) {
			t.Errorf("%s: status %d: %s", path, status, body)
		}
	}
	var all struct {
		Root      string
		Snapshots []struct{ Name string }
		Layers    []struct{ State string }
	}
	body, _ := get(t, d, "/v1/snapshots")
	kittest.Check(t, json.Unmarshal(body, &all))
	if all.Root != d.Root || len(all.Snapshots) != 1 || all.Snapshots[0].Name != "layer" || all.Layers[0].State != "ready" {
		t.Errorf("/v1/snapshots: %s", body)
	}
	if body, status := get(t, d, "/v1/journal"); status != http.StatusOK || !strings.Contains(string(body), `"committed":[{`) {
		t.Errorf("/v1/journal: status %d: %s", status, body)
	}
	if body, status := get(t, d, "/v1/images"); status != http.StatusInternalServerError || !strings.Contains(string(body), "containerd") {
		t.Errorf("/v1/images without containerd: status %d: %s", status, body)
	}
	if _, status := get(t, d, "/v1/nothing"); status != http.StatusNotFound {
		t.Errorf("an unknown path: status %d", status)
	}
	if mode := kittest.Must[os.FileInfo](t)(os.Stat(filepath.Join(filepath.Dir(d.Address), "admin.sock"))).Mode().Perm(); mode != 0o600 {
		t.Errorf("admin.sock has the mode %o", mode)
	}
	if out, _, status := kittest.Verb(t, d, "health"); status != 0 || out != "serving\n" {
		t.Errorf("health: status %d: %s", status, out)
	}
	kittest.Check(t, d.Stop())
	if _, stderr, status := kittest.Verb(t, d, "health"); status != 1 || !strings.Contains(stderr, d.Address) {
		t.Errorf("health without a daemon: status %d: %s", status, stderr)
	}
}

// TestUnhealthy: on a file system that does not accept writes the daemon is neither healthy nor
// ready.
func TestUnhealthy(t *testing.T) {
	disk := newDisk(t, kit.DiskOptions{})
	d := kittest.StartDaemon(t, kit.DaemonOptions{Dir: disk.Path("durable"), RunDir: scratch(t)})
	sn := kittest.Connect(t, d)
	_, err := sn.Prepare(t.Context(), "key", "")
	kittest.Check(t, err)
	kittest.Check(t, disk.Shutdown())
	kittest.WaitFor(t, time.Minute, func() error {
		// The first write that is synced.
		err := sn.Remove(t.Context(), "key")
		if err == nil {
			t.Fatal("a snapshot is removed on a file system that was shut down")
		}
		if errdefs.IsUnavailable(err) {
			return nil
		}
		return err
	})
	for _, path := range []string{"/healthz", "/readyz"} {
		if body, status := get(t, d, path); status != http.StatusServiceUnavailable {
			t.Errorf("%s: status %d: %s", path, status, body)
		}
	}
	if _, stderr, status := kittest.Verb(t, d, "health"); status != 1 || !strings.Contains(stderr, "does not accept writes") {
		t.Errorf("health: status %d: %s", status, stderr)
	}
	text, _ := get(t, d, "/metrics")
	if v := metrics(t, text)["durable_snapshotter_filesystem_writable"]; v != 0 {
		t.Errorf("filesystem_writable = %v", v)
	}
}

// TestSocketsOfServiceManager plays systemd's part for socket units: the sockets are there before
// the daemon and outlive it, and a client that calls while none runs is answered by the next.
func TestSocketsOfServiceManager(t *testing.T) {
	disk, run := newDisk(t, kit.DiskOptions{}), scratch(t)
	var files []*os.File
	for _, name := range []string{"durable.sock", "admin.sock"} {
		l := kittest.Must[*net.UnixListener](t)(net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(run, name), Net: "unix"}))
		defer l.Close()
		f := kittest.Must[*os.File](t)(l.File())
		defer f.Close()
		files = append(files, f)
	}
	start := func(address string) *exec.Cmd {
		cmd := exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=2 exec "$0" serve --root "$1" --address "$2"`, kittest.Binaries(t).Daemon, disk.Path("durable"), address)
		var log bytes.Buffer
		cmd.ExtraFiles, cmd.Stdout, cmd.Stderr = files, &log, &log
		kittest.Check(t, cmd.Start())
		return cmd
	}
	address := filepath.Join(run, "durable.sock")
	sn := kittest.Must[snapshots.Snapshotter](t)((&kit.Daemon{Address: address}).Snapshotter())
	defer sn.Close()
	for round := range 3 {
		answered := make(chan error, 1)
		go func() { // before there is a daemon
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			_, err := sn.Prepare(ctx, fmt.Sprint("key", round), "")
			answered <- err
		}()
		time.Sleep(200 * time.Millisecond) // the call is in the backlog; if it is not, it is answered all the same
		cmd := start(address)
		if err := <-answered; err != nil {
			t.Errorf("round %d: %v\n%s", round, err, cmd.Stdout)
		}
		kittest.Check(t, cmd.Process.Signal(os.Interrupt))
		if err := cmd.Wait(); err != nil {
			t.Errorf("round %d: %v\n%s", round, err, cmd.Stdout)
		}
		for _, name := range []string{"durable.sock", "admin.sock"} {
			if _, err := os.Stat(filepath.Join(run, name)); err != nil {
				t.Errorf("the daemon has removed a socket that is not its own: %v", err)
			}
		}
	}
	cmd := start(filepath.Join(run, "other.sock"))
	err := cmd.Wait()
	if text := fmt.Sprint(cmd.Stdout); err == nil || !strings.Contains(text, "make them equal") {
		t.Errorf("with other addresses than the sockets': %v: %s", err, text)
	}
}

// TestUmask: the mode of a container's root directory does not depend on the umask of
// who starts the daemon.
func TestUmask(t *testing.T) {
	d := kittest.StartDaemon(t, kit.DaemonOptions{
		Dir: newDisk(t, kit.DiskOptions{}).Path(), Wrapper: []string{"sh", "-c", `umask 077; exec "$@"`, "sh"},
	})
	mounts := kittest.Must[[]mount.Mount](t)(kittest.Connect(t, d).Prepare(t.Context(), "key", ""))
	if mode := kittest.Must[os.FileInfo](t)(os.Stat(mounts[0].Source)).Mode(); mode.Perm() != 0o755 {
		t.Errorf("%s has the mode %v", mounts[0].Source, mode)
	}
}
