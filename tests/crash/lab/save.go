package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/klauspost/compress/zstd"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
)

// The files of a saved recording. Two runs of a workload with the same seed
// write the same layers, not the same log: goroutines and the kernel take their
// turns as they come. So a state can be made again only from the log itself.
const (
	saveBase   = "base.zst"    // the image before
	saveLog    = "log.zst"     // in the format of dm-log-writes
	saveRecord = "record.json" // the rest
)

// saved is what stands in record.json.
type saved struct {
	FS      disk.FS
	Options []string
	Seed    uint64
	Layers  workload.Size
	Subject string
	Start   int
	Stats   disk.Stats
	Size    int64
	Generic bool
	Record  *workload.Record
}

// Save writes the recording to a directory, which it makes.
func (r *Recording) Save(dir string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("save recording %s: %w", r.ID(), err)
		}
	}()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := compress(filepath.Join(dir, saveBase), func(w io.Writer) error {
		_, err := r.Base.WriteTo(w)
		return err
	}); err != nil {
		return err
	}
	if err := compress(filepath.Join(dir, saveLog), func(w io.Writer) error {
		return disk.Export(w, r.Log.Entries)
	}); err != nil {
		return err
	}
	text, err := json.MarshalIndent(saved{
		FS: r.FS, Options: r.Options, Seed: r.Seed, Layers: r.Layers, Subject: r.Subject, Start: r.Start,
		Stats: r.Stats, Size: r.Base.Size, Generic: r.Generic, Record: r.Record,
	}, "", "\t")
	if err != nil {
		return err
	}
	// Last, because Load begins with it: what has it is whole.
	return os.WriteFile(filepath.Join(dir, saveRecord), text, 0o644)
}

// Load reads what Save has written.
func Load(dir string) (_ *Recording, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("load recording %s: %w", dir, err)
		}
	}()
	text, err := os.ReadFile(filepath.Join(dir, saveRecord))
	if err != nil {
		return nil, err
	}
	var s saved
	if err := json.Unmarshal(text, &s); err != nil {
		return nil, err
	}
	if !s.FS.Valid() || s.Size <= 0 {
		return nil, fmt.Errorf("%s: file system %q of %d bytes", saveRecord, s.FS, s.Size)
	}
	r := &Recording{
		FS: s.FS, Options: s.Options, Seed: s.Seed, Layers: s.Layers, Subject: s.Subject, Start: s.Start,
		Stats: s.Stats, Generic: s.Generic, Record: s.Record,
	}
	if err := decompress(filepath.Join(dir, saveBase), func(in io.Reader) error {
		r.Base, err = state.NewImage(in, s.Size)
		return err
	}); err != nil {
		return nil, err
	}
	if err := decompress(filepath.Join(dir, saveLog), func(in io.Reader) error {
		entries, err := disk.Import(in)
		r.Log = state.NewLog(entries)
		return err
	}); err != nil {
		return nil, err
	}
	r.Marks = workload.Marks(r.Log.Entries)
	r.Plan, err = workload.NewPlan(r.Seed, r.Layers)
	return r, err
}

func compress(path string, write func(io.Writer) error) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	z, err := zstd.NewWriter(f, zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		return err
	}
	return errors.Join(write(z), z.Close())
}

func decompress(path string, read func(io.Reader) error) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	z, err := zstd.NewReader(f)
	if err != nil {
		return err
	}
	defer z.Close()
	if err := read(z); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// SaveLog writes a log to a file that LoadLog reads.
func SaveLog(path string, entries []disk.Entry) error {
	if err := compress(path, func(w io.Writer) error { return disk.Export(w, entries) }); err != nil {
		return fmt.Errorf("save log: %w", err)
	}
	return nil
}

// LoadLog reads what SaveLog has written.
func LoadLog(path string) (entries []disk.Entry, err error) {
	err = decompress(path, func(in io.Reader) error {
		entries, err = disk.Import(in)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("load log: %w", err)
	}
	return entries, nil
}
