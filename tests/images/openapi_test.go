package images

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/legacy"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// TestOpenAPI: what admin.sock answers is what docs/openapi.yaml has, nothing more and nothing
// less, on a node with images that are ready, damaged and broken.
func TestOpenAPI(t *testing.T) {
	t.Parallel()
	loader := openapi3.NewLoader()
	doc := must[*openapi3.T](t)(loader.LoadFromFile("../../docs/openapi.yaml"))
	check(t, doc.Validate(t.Context()))
	router := must[routers.Router](t)(legacy.NewRouter(doc))

	n := newNode(t)
	n.pull(t, "healthy")
	damaged, broken := n.pull(t, "damaged"), n.pull(t, "broken")
	check(t, os.Remove(n.file(t, damaged, 1, "own/spare")))
	check(t, os.Remove(n.file(t, broken, 1, "own/spare")))
	check(t, os.Remove(n.Blob(broken.Layers[1].Digest)))

	asked := map[string]bool{}
	for _, c := range []struct {
		method, path, body string
		status             int
	}{
		{"GET", "/healthz", "", 200},
		{"GET", "/readyz", "", 200},
		{"GET", "/metrics", "", 200},
		{"GET", "/v1/snapshots", "", 200},
		{"GET", "/v1/images", "", 200},
		{"POST", "/v1/repair", `{"apply": false, "deep": true}`, 200},
		{"POST", "/v1/repair", `{"apply": true}`, 200},
		{"POST", "/v1/repair", `{"everything": true}`, 400},
		{"GET", "/v1/images?namespace=k8s.io&image=" + broken.Ref, "", 200},
		{"GET", "/v1/images?image=nothing", "", 404},
		{"GET", "/v1/journal", "", 200},
		{"GET", "/v1/inspect", "", 200},
	} {
		req := must[*http.Request](t)(http.NewRequestWithContext(t.Context(), c.method, "http://admin"+c.path, strings.NewReader(c.body)))
		if c.body != "" {
			req.Header.Set("Content-Type", "application/json")
		}
		route, params, err := router.FindRoute(req)
		if err != nil {
			t.Errorf("%s %s: %v", c.method, c.path, err)
			continue
		}
		asked[route.Path] = true
		in := &openapi3filter.RequestValidationInput{Request: req, PathParams: params, Route: route}
		if err := openapi3filter.ValidateRequest(t.Context(), in); (err != nil) != (c.status == 400) {
			t.Errorf("%s %s %s: request: %v", c.method, c.path, c.body, err)
		}
		req.Body = io.NopCloser(strings.NewReader(c.body))
		resp, body := n.admin(t, req)
		if resp.StatusCode != c.status {
			t.Errorf("%s %s: status %d: %s", c.method, c.path, resp.StatusCode, body)
		}
		out := &openapi3filter.ResponseValidationInput{
			RequestValidationInput: in, Status: resp.StatusCode, Header: resp.Header, Body: io.NopCloser(bytes.NewReader(body)),
			Options: &openapi3filter.Options{IncludeResponseStatus: true},
		}
		if resp.Header.Get("Content-Type") != "application/json" {
			out.Header = http.Header{"Content-Type": {"text/plain"}} // with parameters that do not matter here
		}
		if err := openapi3filter.ValidateResponse(t.Context(), out); err != nil {
			t.Errorf("%s %s: answer: %v", c.method, c.path, err)
		}
	}
	table := string(must[[]byte](t)(os.ReadFile("../../docs/operations.md")))
	for path := range doc.Paths.Map() {
		if !asked[path] {
			t.Errorf("%s is not requested by this test", path)
		}
		if !slices.ContainsFunc([]string{"GET", "POST"}, func(m string) bool { return strings.Contains(table, fmt.Sprintf("| `%s %s` |", m, path)) }) {
			t.Errorf("docs/operations.md lacks %s", path)
		}
	}
}

// admin sends a request to the daemon's admin.sock.
func (n *node) admin(t *testing.T, req *http.Request) (*http.Response, []byte) {
	t.Helper()
	resp := must[*http.Response](t)(kit.AdminClient(n.Daemon.Address).Do(req))
	defer resp.Body.Close()
	return resp, must[[]byte](t)(io.ReadAll(resp.Body))
}
