package readiness

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

const answersFile = "testdata/answers.txt"

// TestAnswers measures what containerd makes of each kind of error that Stat,
// Prepare and View can give for a layer that is not whole. The layers from the
// second one of an image upwards are named in the errors, the lowest is whole;
// the registry has all that could be missing. NotFound is one case; all the
// other kinds are one more, and differ in the code that users see: two of them are
// enough when nothing is written down anew.
func TestAnswers(t *testing.T) {
	t.Parallel()
	seen := map[string]string{}
	kinds := []codes.Code{codes.FailedPrecondition, codes.Unavailable} // those of this snapshotter
	if *update || kittest.Every() {
		kinds = append(kinds, codes.NotFound)
	}
	if *update {
		kinds = append(kinds, codes.DataLoss, codes.Internal)
	}
	for _, code := range kinds {
		t.Run(code.String(), func(t *testing.T) { answers(t, code, seen) })
	}
	if *update && !t.Failed() {
		writeAnswers(t, seen)
	}
}

// notes is what was seen in one situation: a line per call.
type notes struct {
	n    *node
	t    *testing.T
	code codes.Code
	text strings.Builder
}

func (o *notes) see(question, answer string) {
	answer = strings.ReplaceAll(o.n.anonymous(answer), "code = "+o.code.String(), "code = <that code>")
	fmt.Fprintf(&o.text, "%-34s %s\n", question+":", answer)
}

func (o *notes) seeError(question string, err error) {
	if err != nil {
		o.see(question, "error: "+err.Error())
		return
	}
	o.see(question, "ok")
}

// seeAny is seeError for an error that names one of the layers: the first in the order of
// containerd's records, which is that of their digests.
func (o *notes) seeAny(question string, err error) {
	for i, id := range o.n.app.ChainIDs[1:] {
		if err != nil && strings.Contains(err.Error(), id.String()) {
			o.see(question, strings.ReplaceAll(o.n.anonymous("error: "+err.Error()), fmt.Sprintf("<app %d>", i+2), "<one of app>"))
			return
		}
	}
	o.seeError(question, err)
}

func (o *notes) seePresent(question string, img kit.Pushed) {
	answer := "absent"
	if o.n.present(o.t, img) {
		answer = "present"
	}
	o.see(question, answer)
}

// anonymous replaces what differs from run to run.
func (n *node) anonymous(text string) string {
	for _, img := range []struct {
		name string
		kit.Pushed
	}{{"app", n.app}, {"pause", n.pause}} {
		text = strings.ReplaceAll(text, img.Ref, img.name)
		text = strings.ReplaceAll(text, img.Manifest.String(), "<manifest of "+img.name+">")
		for i, id := range img.ChainIDs {
			text = strings.ReplaceAll(text, id.String(), fmt.Sprintf("<%s %d>", img.name, i+1))
		}
	}
	text = strings.ReplaceAll(text, n.pause.Ref[:strings.Index(n.pause.Ref, "/")], "<registry>")
	text = regexp.MustCompile(`extract-\d+-\S+ `).ReplaceAllString(text, "extract-… ")
	text = regexp.MustCompile(`\b[0-9a-f]{64}\b`).ReplaceAllString(text, "<id>")
	return strings.Join(strings.Fields(text), " ")
}

// answers goes through the life of a node whose layers are not whole.
func answers(t *testing.T, code codes.Code, seen map[string]string) {
	n := newNode(t)
	expected := readAnswers(t)
	kind := "another error"
	if code == codes.NotFound {
		kind = "NotFound"
	}
	group := func(name string, f func(o *notes)) {
		section := kind + ": " + name
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			o := &notes{n: n, t: t, code: code}
			f(o)
			seen[section] = o.text.String()
			if want := expected[section]; !*update && o.text.String() != want {
				t.Errorf("%s\ngot\n%s\nwant\n%s", section, o.text.String(), want)
			}
		})
	}
	p := n.inUse(t)
	check(t, p.run(t, n.app))

	bad := n.backend(t, n.app)[1:]
	n.between.answerWith(code, bad...)
	group("containerd was running before", func(o *notes) {
		o.seePresent("ImageStatus", n.app)
		o.seeError("CreateContainer", p.run(o.t, n.app))
		o.seeError("PullImage", n.pull(o.t, n.app))
	})
	n.restart(t)
	group("containerd restarted", func(o *notes) {
		o.seePresent("ImageStatus", n.app)
		o.seeError("CreateContainer", p.run(o.t, n.app))
		o.see("ctr images check", n.checked(o.t, n.app))
		o.seeAny("ctr snapshots ls", n.listed(o.t))
		o.see("ImageFsInfo", n.counted(o.t))
		o.seeError("PullImage", n.pull(o.t, n.app))
		o.seePresent("ImageStatus after it", n.app)
		o.seeError("ctr images pull", n.ctrPull(o.t, n.app))
		o.seePresent("ImageStatus after it", n.app)
	})
	n.restart(t)
	group("forced back into the list", func(o *notes) {
		o.seeError("ctr images label", n.touch(o.t, n.app))
		o.seePresent("ImageStatus", n.app)
		o.seeError("CreateContainer", p.run(o.t, n.app))
	})
	n.restart(t)
	n.between.answerWith(codes.OK)
	group("healed while containerd runs", func(o *notes) {
		o.seePresent("ImageStatus", n.app)
		o.seeError("CreateContainer", p.run(o.t, n.app))
		o.seeError("PullImage", n.pull(o.t, n.app))
		o.seePresent("ImageStatus after it", n.app)
		o.seeError("CreateContainer after it", p.run(o.t, n.app))
	})

	p.remove(t)
	n.between.answerWith(code, n.backend(t, n.pause)[1:]...)
	n.restart(t)
	group("the pause image", func(o *notes) {
		o.seePresent("ImageStatus", n.pause)
		o.seeError("RunPodSandbox", n.pod(o.t))
		o.seePresent("ImageStatus after it", n.pause)
		n.between.answerWith(codes.OK)
		o.seeError("RunPodSandbox when healed", n.pod(o.t))
		o.seePresent("ImageStatus after it", n.pause)
	})

	group("ways out", func(o *notes) { waysOut(o, code) })
	group("ways out that a container bars", func(o *notes) { barred(o, code) })

	n.spoil(t, code)
	check(t, n.GoOffline())
	group("healed without a registry", func(o *notes) {
		n.between.answerWith(codes.OK)
		o.seePresent("ImageStatus", n.app)
		o.seeError("PullImage", n.pull(o.t, n.app))
		o.seePresent("ImageStatus after it", n.app)
		o.seeError("ctr images label", n.touch(o.t, n.app))
		o.seePresent("ImageStatus after it", n.app)
		o.seeError("RunPodSandbox", n.pod(o.t))
	})
}

// pod starts a sandbox and removes it again.
func (n *node) pod(t *testing.T) error {
	p, err := n.startPod(t)
	if err == nil {
		p.remove(t)
	}
	return err
}

// checked is what `ctr images check` reports of an image: its status and whether it
// is unpacked, or the error.
func (n *node) checked(t *testing.T, img kit.Pushed) string {
	out, err := n.ctr(t, "images", "check", "--snapshotter", "durable", "name=="+img.Ref)
	if err != nil {
		return "error: " + messageOfCtr(err).Error()
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	f := strings.Fields(lines[len(lines)-1])
	return fmt.Sprintf("%s %s, unpacked %s", f[3], f[4], f[len(f)-1])
}

func (n *node) listed(t *testing.T) error {
	_, err := n.ctr(t, "snapshots", "--snapshotter", "durable", "ls")
	return messageOfCtr(err)
}

func (n *node) ctrPull(t *testing.T, img kit.Pushed) error {
	_, err := n.ctr(t, "images", "pull", "--plain-http", "--snapshotter", "durable", img.Ref)
	return messageOfCtr(err)
}

// messageOfCtr reduces an error to the last message of ctr itself.
func messageOfCtr(err error) error {
	if err == nil {
		return nil
	}
	all := regexp.MustCompile(`(?m)^ctr: .*`).FindAllString(err.Error(), -1)
	if len(all) == 0 {
		return err
	}
	return errors.New(all[len(all)-1])
}

// touch changes a label of an image, which makes the CRI read it again, and
// waits until it has.
func (n *node) touch(t *testing.T, img kit.Pushed) error {
	if _, err := n.ctr(t, "images", "label", img.Ref, "touched=yes"); err != nil {
		return messageOfCtr(err)
	}
	n.waitKnown(t, img, true)
	return nil
}

// counted reports whether the CRI plugin can sum up the space of the snapshots. It
// tries at its start; until then the answer is 0.
func (n *node) counted(t *testing.T) (answer string) {
	waitFor(t, 30*time.Second, func() error {
		ctx, cancel := within(t)
		defer cancel()
		r := must[*runtimeapi.ImageFsInfoResponse](t)(n.CRI.Images.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{}))
		log := must[string](t)(n.Containerd.Log())
		failed := strings.Contains(log[n.started:], "Failed to sync snapshot stats")
		for _, fs := range r.ImageFilesystems {
			if fs.InodesUsed.GetValue() > 0 && !failed {
				answer = "counted"
				return nil
			}
		}
		if failed {
			answer = "nothing is counted"
			return nil
		}
		return fmt.Errorf("ImageFsInfo: %v", r)
	})
	return answer
}

// spoil starts anew: the image is whole, then the snapshotter reports of its upper
// layers that they are not, and containerd is restarted.
func (n *node) spoil(t *testing.T, code codes.Code) {
	t.Helper()
	n.between.answerWith(codes.OK)
	check(t, n.pull(t, n.app))
	n.between.answerWith(code, n.backend(t, n.app)[1:]...)
	n.restart(t)
}

// waysOut tries what people and programs can do while the layers stay bad.
func waysOut(o *notes, code codes.Code) {
	n, t := o.n, o.t
	p := must[*pod](t)(n.startPod(t))
	defer p.remove(t)

	n.spoil(t, code)
	_, err := n.CRI.Images.RemoveImage(t.Context(), &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: n.app.Ref}})
	o.seeError("RemoveImage", err)
	o.seeError("then PullImage", n.pull(t, n.app))

	n.spoil(t, code)
	o.seeError("ctr images rm, all names", n.removeImage(t, n.app))
	o.seeError("then PullImage", n.pull(t, n.app))
	o.seeError("then CreateContainer", p.run(t, n.app))

	n.spoil(t, code)
	o.seeError("Remove of the keys, top down", n.removeKeys(t, n.app, 1))
	o.seePresent("then ImageStatus", n.app)
	o.seeError("then CreateContainer", p.run(t, n.app))
	n.spoil(t, code)
	o.seeError("Remove of the keys, top down", n.removeKeys(t, n.app, 1))
	o.seeError("then PullImage", n.pull(t, n.app))
	o.seeError("then CreateContainer", p.run(t, n.app))
}

// barred tries the same while a container that has ended holds the layers.
func barred(o *notes, code codes.Code) {
	n, t := o.n, o.t
	n.between.answerWith(codes.OK)
	check(t, n.pull(t, n.app))
	p := must[*pod](t)(n.startPod(t))
	defer p.remove(t)
	id := must[string](t)(p.create(t, n.app, "wait"))

	n.spoil(t, code)
	o.seeError("Remove of the keys, top down", n.removeKeys(t, n.app, 1))
	o.seeError("ctr images rm, all names", n.removeImage(t, n.app))
	o.seeError("then PullImage", n.pull(t, n.app))
	o.seePresent("then ImageStatus", n.app)
	o.seeError("StartContainer of the one that is", p.start(t, id))
	n.between.answerWith(codes.OK)
	o.seeError("PullImage when healed", n.pull(t, n.app))
	p.removeContainer(t, id)
}

// removeImage removes every name of an image and waits for the garbage
// collection and for the CRI plugin.
func (n *node) removeImage(t *testing.T, img kit.Pushed) error {
	ctx, cl := n.client(t)
	all, err := cl.ImageService().List(ctx, "target.digest=="+img.Manifest.String())
	if err != nil {
		return err
	}
	args := []string{"images", "rm", "--sync"}
	for _, i := range all {
		args = append(args, i.Name)
	}
	if _, err = n.ctr(t, args...); err != nil {
		return messageOfCtr(err)
	}
	n.waitKnown(t, img, false)
	return nil
}

// removeKeys removes containerd's keys of an image's snapshots from the top down
// to number first. Once the top is gone, the garbage collection that follows a
// start of containerd may be there before us.
func (n *node) removeKeys(t *testing.T, img kit.Pushed, first int) error {
	ctx, cl := n.client(t)
	var sn snapshots.Snapshotter = cl.SnapshotService("durable")
	for i := len(img.ChainIDs) - 1; i >= first; i-- {
		err := sn.Remove(ctx, img.ChainIDs[i].String())
		if err != nil && (i == len(img.ChainIDs)-1 || !errdefs.IsNotFound(err)) {
			return err
		}
	}
	return nil
}

// readAnswers reads the file of expected answers: sections of a head in brackets
// and lines.
func readAnswers(t testing.TB) map[string]string {
	t.Helper()
	sections := map[string]string{}
	text, err := os.ReadFile(answersFile)
	if os.IsNotExist(err) && *update {
		return sections
	}
	check(t, err)
	head := ""
	for line := range strings.Lines(string(text)) {
		switch {
		case strings.HasPrefix(line, "["):
			head = strings.Trim(line, "[]\n")
		case strings.TrimSpace(line) != "":
			sections[head] += line
		}
	}
	return sections
}

func writeAnswers(t testing.TB, seen map[string]string) {
	t.Helper()
	old := readAnswers(t)
	for head, text := range seen {
		old[head] = text
	}
	var b strings.Builder
	for _, head := range slices.Sorted(maps.Keys(old)) {
		fmt.Fprintf(&b, "[%s]\n%s\n", head, old[head])
	}
	check(t, os.MkdirAll(filepath.Dir(answersFile), 0o755))
	check(t, os.WriteFile(answersFile, []byte(b.String()), 0o644))
}
