package oracle

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layers"
	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// Repair has durable-snapshotter verify layers, and heal them if the options demand
// it, as its command repair does.
func (r *Running) Repair(ctx context.Context, o layers.RepairOptions) (results []layers.RepairResult, err error) {
	body, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	return results, r.admin(ctx, http.MethodPost, "/v1/repair", body, &results)
}

// Report is what durable-snapshotter's command inspect prints.
func (r *Running) Report(ctx context.Context) (report snapshotter.Report, err error) {
	return report, r.admin(ctx, http.MethodGet, "/v1/inspect", nil, &report)
}

// admin sends a request to the admin socket, which is beside the other one.
func (r *Running) admin(ctx context.Context, method, path string, body []byte, answer any) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s %s: %w", method, path, err)
		}
	}()
	req, err := http.NewRequestWithContext(ctx, method, "http://admin"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := kit.AdminClient(r.program.Address).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, err := io.ReadAll(resp.Body)
		return errors.Join(fmt.Errorf("%s: %s", resp.Status, bytes.TrimSpace(text)), err)
	}
	return json.NewDecoder(resp.Body).Decode(answer)
}

// noBlob is how durable-snapshotter's error about a damaged layer begins when all
// its blobs are missing or corrupt. Where the error only quotes that of a layer
// below, it comes later.
const noBlob = "there is no good blob of it"

// NoBlob returns the layers of which the log reports, since the start, that they
// have no good blob.
func (r *Running) NoBlob() (names []string, err error) {
	f, err := os.Open(r.program.Log)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if _, err := f.Seek(r.logged, io.SeekStart); err != nil {
		return nil, err
	}
	text, err := io.ReadAll(f)
	if err != nil {
		return nil, err
	}
	for line := range bytes.Lines(text) {
		var entry struct{ Name, Error string }
		if json.Unmarshal(line, &entry) == nil && entry.Name != "" && strings.HasPrefix(entry.Error, noBlob) {
			names = append(names, entry.Name)
		}
	}
	return names, nil
}
