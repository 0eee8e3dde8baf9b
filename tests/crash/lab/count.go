package lab

import "github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"

// Count takes in the result of an examination by another package; Check counts its
// own.
func (t *Tally) Count(r Result, retried int) { t.add(r, retried) }

// Weigh keeps the findings if they are worse than those so far.
func (r *Result) Weigh(findings []oracle.Finding) { r.weigh(findings) }
