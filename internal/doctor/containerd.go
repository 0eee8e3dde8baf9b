package doctor

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
)

// Running are facts about the containerd that runs.
type Running struct {
	PID     int   // 0 when none answers
	Err     error // why nothing is known
	Version string
	Plugins []repull.Plugin
	CRI     repull.CRI
	CRIErr  error
	Content string // directory of its content store
}

func running(ctx context.Context, c Config) (r Running) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	if c.Containerd == "" {
		r.Err = errors.New("[containerd] address is empty in the configuration of the daemon")
		return r
	}
	pid, err := listener(c.Containerd)
	if err != nil {
		r.Err = fmt.Errorf("containerd does not answer: %w", err)
		return r
	}
	conn, err := repull.Connect(c.Containerd)
	if err != nil {
		r.Err = err
		return r
	}
	defer conn.Close()
	if r.Plugins, r.Err = conn.Plugins(ctx); r.Err != nil {
		return r
	}
	r.PID = pid
	r.Version, _ = conn.Version(ctx)
	r.CRI, r.CRIErr = conn.CRI(ctx)
	r.Content, _ = conn.View().ContentRoot(ctx)
	return r
}

// named returns a plugin, nil when it is not loaded.
func (r Running) named(kind, id string) *repull.Plugin {
	for i, p := range r.Plugins {
		if p.Type == kind && (id == "" || p.ID == id) {
			return &r.Plugins[i]
		}
	}
	return nil
}

const (
	snapshotType = "io.containerd.snapshotter.v1"
	transferType = "io.containerd.transfer.v1"
	differType   = "io.containerd.differ.v1"
)

// ours are the plugins with the daemon's socket.
func (f *Facts) ours() (all []repull.Plugin) {
	for _, p := range f.Running.Plugins {
		address := strings.TrimPrefix(p.Exports["address"], "unix://")
		if p.Type == snapshotType && address != "" && samePath(address, f.Address) {
			all = append(all, p)
		}
	}
	return all
}

// before reports whether the running containerd is older than a release. Nothing is older when its
// release is not known.
func (r Running) before(major, minor, patch int) bool {
	v, ok := release(r.Version)
	return ok && slices.Compare(v[:], []int{major, minor, patch}) < 0
}

// release takes a version such as v1.6.20~ds1 apart.
func release(version string) (v [3]int, ok bool) {
	parts := strings.SplitN(strings.TrimPrefix(version, "v"), ".", 3)
	for i, p := range parts {
		if end := strings.IndexFunc(p, func(r rune) bool { return r < '0' || r > '9' }); end >= 0 {
			p = p[:end]
		}
		n, err := strconv.Atoi(p)
		if err != nil {
			return v, false
		}
		v[i] = n
	}
	return v, len(parts) == 3
}

func plugin(f *Facts) (found []Finding) {
	names, ours := f.Files.proxies(f.Address), f.ours()
	switch {
	case f.Running.Err != nil:
		return fail(f.Running.Err.Error(), "start containerd, or set [containerd] address in /etc/durable-snapshotter/config.toml to its socket: doctor --print-config prints that file for k3s, rke2, k0s and microk8s")
	case len(ours) == 0 && len(names) > 0:
		return fail(fmt.Sprintf("the files of containerd have this snapshotter as %s, and the running containerd does not", strings.Join(names, ", ")), "restart containerd")
	case len(ours) == 0 && f.notImported() != "":
		path, main := f.notImported(), f.Files.main().Path
		return fail(fmt.Sprintf("%s has this snapshotter, and is not imported by %s", path, main),
			fmt.Sprintf("add imports = [%q] above the first table of %s, or its template, and restart containerd", filepath.Join(filepath.Dir(path), "*.toml"), main))
	case len(ours) == 0:
		text := "no proxy plugin of the running containerd has the address " + f.Address
		if f.Files.Dump != nil {
			text += ", and its files have none either"
		}
		return fail(text, "")
	case len(ours) > 1:
		found = append(found, warn("containerd has this snapshotter under several names: it deletes under one what it knows under another", "leave one of them in proxy_plugins, and restart containerd")...)
	case f.Files.Dump != nil && len(names) == 0:
		found = append(found, fail("the running containerd has this snapshotter, and its files have it no more: after a restart its images are gone", "")...)
	}
	for _, p := range ours {
		rebase := slices.Contains(p.Capabilities, "rebase")
		switch {
		case p.Failed != "":
			found = append(found, fail(fmt.Sprintf("proxy plugin %s did not start: %s", p.ID, p.Failed), "see the log of containerd")...)
		case p.Exports["root"] == "" && !f.Running.before(2, 0, 0) || p.Exports["root"] != "" && !samePath(p.Exports["root"], f.Root):
			found = append(found, warn(fmt.Sprintf("proxy plugin %s exports the root %q, and not %s: the kubelet watches the wrong file system", p.ID, p.Exports["root"], f.Root), "set root in [proxy_plugins."+p.ID+".exports], and restart containerd")...)
		case rebase && f.Running.before(2, 3, 0):
			found = append(found, warn(fmt.Sprintf("proxy plugin %s has the capability rebase, which containerd %s does not handle", p.ID, f.Running.Version), "leave it out of capabilities before 2.3")...)
		}
		if p.ID != f.Snapshotter {
			found = append(found, warn(fmt.Sprintf("the snapshotter is %s at containerd, and %s in the daemon's configuration", p.ID, f.Snapshotter), "set [containerd] snapshotter in /etc/durable-snapshotter/config.toml")...)
		}
	}
	return orOK(found, fmt.Sprintf("containerd %s has this snapshotter as %s", f.Running.Version, ours[0].ID))
}

// notImported is a drop-in with this snapshotter that the main file does not import, "" when there
// is none.
func (f *Facts) notImported() string {
	for _, file := range f.Files.All {
		for name := range file.Has.at("proxy_plugins") {
			if p := file.Has.at("proxy_plugins", name); !file.Imported && samePath(strings.TrimPrefix(p.text("address"), "unix://"), f.Address) {
				return file.Path
			}
		}
	}
	return ""
}

func parses(f *Facts) (found []Finding) {
	if f.Files.Broken != nil {
		return fail("containerd will not start again: "+f.Files.Broken.Error(), "")
	}
	for _, file := range f.Files.All {
		if file.Imported && file.Err != nil && !errors.Is(file.Err, os.ErrNotExist) {
			found = append(found, fail(fmt.Sprintf("%s: %v", file.Path, file.Err), "")...)
		}
		for name := range file.Has.at("proxy_plugins") {
			if file.Imported && file.Has.at("proxy_plugins", name).text("type") == "diff" && f.Running.before(1, 7, 0) {
				found = append(found, fail(fmt.Sprintf("%s has the proxy plugin %s with type = \"diff\": containerd %s panics at its start", file.Path, name, f.Running.Version), "remove it, or upgrade containerd")...)
			}
		}
	}
	switch {
	case len(found) > 0:
	case f.Files.Err != nil:
		return unknown(f.Files.Err.Error())
	}
	return orOK(found, "containerd accepts "+f.Files.main().Path)
}

func criSnapshotter(f *Facts) (found []Finding) {
	ours := f.ours()
	switch {
	case f.Running.Err != nil:
		return unknown("containerd does not answer")
	case errors.Is(f.Running.CRIErr, repull.ErrNoCRI):
		for _, p := range f.Running.Plugins {
			if p.Failed != "" && (p.Type == "io.containerd.grpc.v1" && p.ID == "cri" || strings.HasPrefix(p.Type, "io.containerd.cri.v1")) {
				return fail("the CRI plugin did not start: "+p.Failed, "correct what the message names, and restart containerd")
			}
		}
		return ok("containerd runs without the CRI plugin, as for Docker or BuildKit")
	case f.Running.CRIErr != nil:
		return fail(f.Running.CRIErr.Error(), "see the log of containerd")
	}
	is := func(name string) bool {
		return slices.ContainsFunc(ours, func(p repull.Plugin) bool { return p.ID == name })
	}
	has := f.Running.CRI.Of(f.Running.Plugins)
	switch {
	case has == "":
		return unknown("nothing shows which snapshotter has the images of pods, at " + f.Running.CRI.ImageFs)
	case !is(has):
		why, cure := f.whyNot()
		found = append(found, fail(fmt.Sprintf("pods are on %s: %s", has, why), cure)...)
	case f.Files.Dump != nil && f.Files.images() != nil && !slices.Contains(f.Files.proxies(f.Address), f.Files.images().text("snapshotter")):
		why, cure := f.whyNot()
		found = append(found, fail(fmt.Sprintf("pods are on %s, and after a restart of containerd on %s: %s", has, f.Files.images().text("snapshotter"), why), cure)...)
	}
	for name, own := range f.Running.CRI.Runtimes {
		if !is(own) {
			found = append(found, warn(fmt.Sprintf("pods of the runtime %s are on %s", name, own), "remove snapshotter from the table of this runtime, unless it is wanted")...)
		}
	}
	return orOK(found, "pods are on "+has)
}

// whyNot is why the CRI plugin uses another snapshotter, and the cure, by the files.
func (f *Facts) whyNot() (why, cure string) {
	names := f.Files.proxies(f.Address)
	if f.Files.Dump != nil && slices.Contains(names, f.Files.images().text("snapshotter")) {
		return "the files of containerd have this snapshotter, and it was not restarted since", "restart containerd"
	}
	wants := func(t table) bool {
		s := t.text("snapshotter")
		return s != "" && (s == f.Snapshotter || slices.Contains(names, s))
	}
	main := f.Files.main()
	for _, file := range f.Files.All {
		p := file.Has.at("plugins")
		v2, v3 := wants(p.at(criPlugin, "containerd")), wants(p.at(imagesPlugin))
		wrong := wants(p.at(runtimePlugin)) || wants(p.at(runtimePlugin, "containerd")) || wants(p.at(criPlugin))
		switch {
		case !v2 && !v3 && !wrong:
		case !file.Imported:
			return fmt.Sprintf("%s is not imported by %s", file.Path, main.Path),
				fmt.Sprintf("add imports = [%q] above the first table of %s, and restart containerd", filepath.Join(filepath.Dir(file.Path), "*.toml"), main.Path)
		case file.Path != main.Path && file.Has.version() != main.Has.version() && !(main.Has.version() == 4 && file.Has.version() == 3):
			return fmt.Sprintf("%s is of version %d, and %s of version %d", file.Path, file.Has.version(), main.Path, main.Has.version()),
				"use the text for the version of the main file"
		case v2 && file.Has.version() < 3 && !f.Running.before(2, 0, 0) && p.at(criPlugin, "containerd", "runtimes") == nil:
			return fmt.Sprintf("%s is of version 2 and has no table containerd.runtimes: containerd 2.x then ignores snapshotter", file.Path),
				`add [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc] with runtime_type = "io.containerd.runc.v2", and restart containerd`
		case v2 && file.Has.version() >= 3:
			return fmt.Sprintf("%s is of version %d and sets snapshotter in a table of version 2", file.Path, file.Has.version()),
				"set it in [plugins.'" + imagesPlugin + "'], and restart containerd"
		case wrong:
			return fmt.Sprintf("%s sets snapshotter in a table that has no such key", file.Path),
				"set it in [plugins.'" + imagesPlugin + "'], or in version 2 in [plugins.\"" + criPlugin + "\".containerd], and restart containerd"
		}
	}
	return "no file sets another one", ""
}

func unpackConfig(f *Facts) (found []Finding) {
	if p := f.Running.named(transferType, ""); p != nil && p.Failed != "" {
		found = append(found, fail("the transfer service of containerd did not start: "+p.Failed, "")...)
	}
	transfer := f.Files.Dump.at("plugins", transferPlugin)
	names := f.Files.proxies(f.Address)
	if transfer == nil || len(names) == 0 {
		return orOK(found, "not known: containerd has no transfer service, or its files do not have this snapshotter")
	}
	entries, listed := transfer.tables("unpack_config"), map[string]bool{}
	for _, e := range entries {
		name, differ := e.text("snapshotter"), e.text("differ")
		listed[name] = true
		// A proxy plugin that runs may have left the files.
		built := f.Running.named(snapshotType, name)
		registered := built != nil && built.Exports["address"] == "" || f.Files.Dump.at("proxy_plugins", name) != nil
		if !registered && !e.truth("optional") && f.Running.PID != 0 {
			found = append(found, fail(fmt.Sprintf("an entry names the snapshotter %q, which is not registered: the transfer service, and the CRI plugin with it, do not start", name), "correct the name, or remove the entry")...)
		}
		if d := f.Running.named(differType, differ); differ != "" && f.Running.PID != 0 && d == nil && f.Files.Dump.at("proxy_plugins", differ) == nil {
			found = append(found, fail(fmt.Sprintf("the entry of %s names the differ %q, which is not registered", name, differ), `use differ = "walking"`)...)
		}
	}
	if !slices.ContainsFunc(names, func(n string) bool { return listed[n] }) {
		text := "unpack_config has no entry for " + strings.Join(names, ", ")
		if cri := f.Files.images(); cri != nil && !cri.truth("use_local_image_pull") && slices.Contains(names, cri.text("snapshotter")) && !f.Running.before(2, 2, 0) {
			found = append(found, fail(text+": pulls of pods fail with \"no unpack platforms defined\"", "")...)
		} else {
			found = append(found, warn(text+": pulls through the transfer service, such as those of ctr, fail", "")...)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(f.Content.Others)) {
		if len(entries) > 0 && !listed[name] {
			found = append(found, warn(fmt.Sprintf("unpack_config has no entry for %s, which has images: the next pull for it fails", name), "")...)
		}
	}
	return orOK(found, "the transfer service unpacks for "+strings.Join(slices.Sorted(maps.Keys(listed)), ", "))
}

func syncKnobs(f *Facts) []Finding {
	if f.Files.Dump == nil {
		return unknown("what the files of containerd come to is not known")
	}
	var set []string
	if f.Files.images().truth("image_pull_with_sync_fs") || f.Files.Dump.at("plugins", criPlugin).truth("image_pull_with_sync_fs") {
		set = append(set, "image_pull_with_sync_fs")
	}
	if f.Files.Dump.at("plugins", diffService).truth("sync_fs") {
		set = append(set, "sync_fs")
	}
	if len(set) > 0 {
		return ok(strings.Join(set, " and ") + ": harmless; layers of this snapshotter are synced by it, and pulls take longer")
	}
	return ok("containerd does not sync layers by itself, and need not")
}

func discards(f *Facts) []Finding {
	switch {
	case f.Files.Dump == nil || f.Files.images() == nil:
		return unknown("what the files of containerd come to is not known, or it has no CRI plugin")
	case f.Files.images().truth("discard_unpacked_layers"):
		return warn("discard_unpacked_layers = true: the blobs of pods' images are deleted, and a damaged layer can be healed from a registry only", "")
	}
	return ok("containerd keeps the blobs of images")
}

// knownBad are releases of containerd with defects that touch this snapshotter: from is the first, fixed
// the first without.
var knownBad = []struct {
	from, fixed [3]int
	text        string
}{
	{[3]int{0, 0, 0}, [3]int{1, 6, 32}, "the kubelet gets the wrong file system of images: exports of a proxy plugin have no effect"},
	{[3]int{1, 7, 0}, [3]int{1, 7, 16}, "the kubelet gets the wrong file system of images: exports of a proxy plugin have no effect"},
	{[3]int{2, 3, 0}, [3]int{2, 3, 4}, "a pause image that is pinned by its digest does not run"},
}

func versions(f *Facts) (found []Finding) {
	v, ok := release(f.Running.Version)
	if !ok {
		return unknown("the release of containerd is not known")
	}
	for _, b := range knownBad {
		if slices.Compare(v[:], b.from[:]) >= 0 && slices.Compare(v[:], b.fixed[:]) < 0 {
			found = append(found, warn(fmt.Sprintf("containerd %s: %s", f.Running.Version, b.text), fmt.Sprintf("upgrade to %d.%d.%d or newer", b.fixed[0], b.fixed[1], b.fixed[2]))...)
		}
	}
	return orOK(found, "no defect of containerd "+f.Running.Version+" is known that matters here")
}

func contentRoot(f *Facts) []Finding {
	switch {
	case f.ContentRoot == "":
		return warn("content_root is empty: damaged layers are refused, and not healed", "")
	case f.Running.Content == "":
		return unknown("containerd does not report its content store")
	case !samePath(f.ContentRoot, f.Running.Content):
		return fail(fmt.Sprintf("content_root is %s, and the running containerd has its blobs in %s: damaged layers are not healed", f.ContentRoot, f.Running.Content),
			fmt.Sprintf("set content_root = %q in /etc/durable-snapshotter/config.toml, and restart the daemon", f.Running.Content))
	}
	return ok("content_root is that of the running containerd")
}
