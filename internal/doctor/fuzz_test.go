package doctor

import (
	"testing"

	"github.com/pelletier/go-toml/v2"
)

// FuzzFiles: whatever containerd's files and answers hold, each check ends with findings.
func FuzzFiles(f *testing.F) {
	f.Add("version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n"+proxy, "version = 2\n[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'durable'\n", "v2.4.2", "durable")
	f.Add("version = 'x'\nproxy_plugins = 3\nplugins = []\n", "[plugins.'io.containerd.transfer.v1.local']\nunpack_config = [1, {snapshotter = 'durable', differ = 2}]\n", "1.6.20~ds1", "")
	f.Add("[plugins.'io.containerd.grpc.v1.cri'.containerd]\ndiscard_unpacked_layers = true\nruntimes = 1\n", "[proxy_plugins]\ndurable = 1\n", "v1.7", "overlayfs")
	f.Fuzz(func(t *testing.T, main, dump, version, snapshotter string) {
		facts := healthy(t)
		file := File{Path: "/etc/containerd/config.toml", Imported: true}
		file.Err = toml.Unmarshal([]byte(main), &file.Has)
		dropIn := file
		dropIn.Path, dropIn.Imported = "/etc/containerd/conf.d/durable.toml", false
		facts.Files.All = []File{file, dropIn}
		facts.Files.Dump = nil
		if err := toml.Unmarshal([]byte(dump), &facts.Files.Dump); err != nil {
			facts.Files.Dump = nil
		}
		facts.Running.Version, facts.Running.CRI.Snapshotter = version, snapshotter
		if found := Run(facts); len(found) < len(Checks) {
			t.Errorf("%d findings of %d checks", len(found), len(Checks))
		}
	})
}
