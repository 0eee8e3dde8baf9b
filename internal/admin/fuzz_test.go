package admin

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/internal/imagecheck"
	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
)

func TestMain(m *testing.M) { treetest.Main(m) }

// FuzzRequests: whatever is requested, there is an answer, and one with status 200 has the
// form that its path promises.
func FuzzRequests(f *testing.F) {
	f.Add("GET", HealthPath, "", "")
	f.Add("GET", ReadyPath, "", "")
	f.Add("GET", MetricsPath, "", "")
	f.Add("GET", SnapshotsPath, "", "")
	f.Add("GET", ImagesPath, "namespace=a&image=%00&image=../x", "")
	f.Add("GET", JournalPath, "", "")
	f.Add("GET", InspectPath, "x", "")
	f.Add("POST", RepairPath, "", `{"ids":[1,18446744073709551615],"apply":true,"deep":true}`)
	f.Add("POST", RepairPath, "", `{"ids":-1,"aply":true}`)
	f.Add("DELETE", "/../v1//repair", "", "")
	treetest.Check(f, log.SetLevel("fatal"))
	f.Setenv("TMPDIR", "/dev/shm") // each start syncs its file system
	root := treetest.Formatted(f, "ext4", 64<<20)
	sn, err := snapshotter.New(f.Context(), snapshotter.Config{Root: root, JournalHistory: 3})
	treetest.Check(f, err)
	s := New(Config{Images: imagecheck.Config{Address: root + "/no-containerd.sock", Repair: imagecheck.Off}}, sn)
	f.Cleanup(func() {
		s.Close()
		treetest.Check(f, sn.Close())
	})
	f.Fuzz(func(t *testing.T, method, path, query, body string) {
		r := &http.Request{Method: method, URL: &url.URL{Path: path, RawQuery: query}, Header: http.Header{}, Host: "localhost", Proto: "HTTP/1.1"}
		if strings.HasPrefix(path, "/debug/") || !strings.HasPrefix(path, "/") {
			return // not this program's, or no request that net/http passes on
		}
		r = r.WithContext(t.Context())
		r.Body = http.NoBody
		if body != "" {
			r.Body = io.NopCloser(strings.NewReader(body))
		}
		w := httptest.NewRecorder()
		s.Handler().ServeHTTP(w, r)
		if w.Code == http.StatusOK && w.Header().Get("Content-Type") == "application/json" && !json.Valid(w.Body.Bytes()) {
			t.Errorf("%s", w.Body)
		}
		if w.Code == http.StatusOK && !strings.HasPrefix(path, "/v1/") && path != HealthPath && path != MetricsPath {
			t.Errorf("%s is answered", path)
		}
	})
}
