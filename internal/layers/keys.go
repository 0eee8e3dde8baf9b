package layers

import (
	"context"

	"github.com/moby/locker"
)

// Keys allows one operation per key.
type Keys struct{ locks *locker.Locker }

// NewKeys returns Keys of which none is locked.
func NewKeys() *Keys { return &Keys{locker.New()} }

// Lock waits for other operations on key and returns the unlock. ctx is checked
// afterwards: nothing is done for a caller that gave up while it waited.
func (k *Keys) Lock(ctx context.Context, key string) (unlock func(), err error) {
	k.locks.Lock(key)
	unlock = func() { _ = k.locks.Unlock(key) } // fails only for a key that is not locked
	if err := ctx.Err(); err != nil {
		unlock()
		return nil, err
	}
	return unlock, nil
}
