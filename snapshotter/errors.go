package snapshotter

import (
	"errors"
	"os"
)

func isNotExist(err error) bool { return errors.Is(err, os.ErrNotExist) }
