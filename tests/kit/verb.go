package kit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// verbLimit is how long a verb may take; one that hangs is an error.
const verbLimit = 5 * time.Minute

// Verb runs a verb of the daemon's program with the configuration, root and
// address of the daemon, which may run or not, and not with its environment. The
// verb's exit status is no error.
func (d *Daemon) Verb(ctx context.Context, args ...string) (stdout, stderr string, status int, err error) {
	ctx, cancel := context.WithTimeout(ctx, verbLimit)
	defer cancel()
	argv := []string{args[0], "--config", d.configPath(), "--root", d.Root, "--address", d.Address}
	cmd := exec.CommandContext(ctx, d.opts.Binary, append(argv, args[1:]...)...)
	cmd.Env = append(os.Environ(), d.opts.VerbEnv...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.Exited() {
		return out.String(), errs.String(), exit.ExitCode(), nil
	}
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, errs.Bytes())
	}
	return out.String(), errs.String(), 0, err
}

// Verdicts runs check or repair with --json and returns what it prints, and its
// exit status.
func (d *Daemon) Verdicts(ctx context.Context, args ...string) (all []Verdict, status int, err error) {
	stdout, stderr, status, err := d.Verb(ctx, slices.Insert(slices.Clone(args), 1, "--json")...)
	if err != nil {
		return nil, status, err
	}
	if err := json.Unmarshal([]byte(stdout), &all); err != nil {
		return nil, status, fmt.Errorf("%s: status %d: %w: %s%s", strings.Join(args, " "), status, err, stdout, stderr)
	}
	return all, status, nil
}

// Inspect returns what inspect --json prints. A running daemon is asked over its admin
// socket, as the verb asks it: to start a program for each poll is most of the processor
// time of a test that waits. The verb itself is tested in tests/verbs.
func (d *Daemon) Inspect(ctx context.Context) (Report, error) {
	if r, err := d.inspect(ctx); err == nil && r.Root == d.Root {
		return r, nil
	}
	stdout, stderr, status, err := d.Verb(ctx, "inspect", "--json")
	if err != nil {
		return Report{}, err
	}
	if status != 0 {
		return Report{}, fmt.Errorf("inspect: status %d: %s", status, stderr)
	}
	var r Report
	if err := json.Unmarshal([]byte(stdout), &r); err != nil {
		return r, fmt.Errorf("inspect: %w: %s", err, stdout)
	}
	return r, nil
}

// inspect gets the report of the daemon that serves at the address.
func (d *Daemon) inspect(ctx context.Context) (r Report, err error) {
	ctx, cancel := context.WithTimeout(ctx, verbLimit)
	defer cancel()
	resp, err := d.Get(ctx, "/v1/inspect")
	if err != nil {
		return r, err
	}
	defer resp.Body.Close()
	return r, json.NewDecoder(resp.Body).Decode(&r)
}

// AdminClient is a client of the admin socket of the daemon that serves at an address.
func AdminClient(address string) *http.Client {
	socket := filepath.Join(filepath.Dir(address), "admin.sock")
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}
}

// ErrNotServed is the error of Get when the daemon does not know the path.
var ErrNotServed = errors.New("404 Not Found")

// Get requests a path of the daemon's admin socket. Another status than 200 is an error. The
// caller closes the body.
func (d *Daemon) Get(ctx context.Context, path string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://admin"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := AdminClient(d.Address).Do(req)
	if err != nil || resp.StatusCode == http.StatusOK {
		return resp, err
	}
	resp.Body.Close()
	if err = errors.New(resp.Status); resp.StatusCode == http.StatusNotFound {
		err = ErrNotServed
	}
	return nil, fmt.Errorf("%s of the daemon: %w", path, err)
}

// Metrics are the daemon's metrics by name.
func (d *Daemon) Metrics(ctx context.Context) (map[string]*dto.MetricFamily, error) {
	resp, err := d.Get(ctx, "/metrics")
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	all, err := parser.TextToMetricFamilies(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("metrics of the daemon: %w", err)
	}
	return all, nil
}

// SnapshotDir is the directory of a snapshot: its tree, record and seal.
func (d *Daemon) SnapshotDir(id uint64) string {
	return filepath.Join(d.Root, "snapshots", strconv.FormatUint(id, 10))
}

// LayerDir is the tree of a snapshot.
func (d *Daemon) LayerDir(id uint64) string { return filepath.Join(d.SnapshotDir(id), "fs") }

// Verdict is what check, repair and inspect print of a layer. It repeats the
// program's JSON and does not import its types: the names are a promise to users.
type Verdict struct {
	ID       uint64
	Name     string
	ChainID  string `json:"chain_id"`
	State    string
	Entries  int64
	Contents string // digest of its content digests, when there are any
	Findings []Finding
	Reason   string
	Blob     string
	NoBlob   string `json:"no_blob"`
	Lacking  bool
	Plan     string // of repair
	Healed   bool   // by repair
}

// Finding is one difference of a layer from its seal.
type Finding struct{ Path, What, Want, Have string }

func (v Verdict) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "layer %d is %s", v.ID, v.State)
	for i, f := range v.Findings {
		if i == 3 {
			fmt.Fprintf(&b, " and %d more findings", len(v.Findings)-i)
			break
		}
		fmt.Fprintf(&b, ", %s: %s: %q, was %q", f.Path, f.What, f.Have, f.Want)
	}
	for _, text := range []string{v.Reason, v.Plan} {
		if text != "" {
			fmt.Fprintf(&b, ", %s", text)
		}
	}
	return b.String()
}

// Report is the part of inspect --json that tests read.
type Report struct {
	Root      string
	Snapshots []Row
	Layers    []Verdict
	Journal   struct {
		Open      []OpenEntry
		Committed []CommitEntry
		History   []CommitEntry
		Scrub     ScrubRound
		Run       struct {
			Epoch       uint64
			ImagesEpoch uint64 `json:"images_epoch"`
		}
	}
	Brake string
}

// Row is a snapshot in the database.
type Row struct {
	ID                 uint64
	Kind, Name, Parent string
}

// OpenEntry is a snapshot that is not committed, in the journal.
type OpenEntry struct {
	ID         uint64
	Key        string
	Extraction bool
	Abandoned  time.Time
	Poisoned   string
	CursorLost bool `json:"cursor_lost"`
}

// CommitEntry is a commit in the journal.
type CommitEntry struct {
	Sequence uint64
	ID       uint64
	Name     string
	ChainID  string `json:"chain_id"`
	Strategy string
}

// ScrubRound is the latest round of the scrub.
type ScrubRound struct {
	Depth             string
	Started, Finished time.Time
	Next              uint64
	Looked, Damaged   int
}

// Find returns the row of a key or a name.
func (r Report) Find(name string) (Row, bool) {
	i := slices.IndexFunc(r.Snapshots, func(s Row) bool { return s.Name == name })
	if i < 0 {
		return Row{}, false
	}
	return r.Snapshots[i], true
}
