package verbs

import (
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

var (
	images  kittest.Images
	newDisk = kittest.NewDisk
	scratch = kittest.Scratch
)

func TestMain(m *testing.M) { images.Main(m) }
