// Package campaign runs crash experiments for as long as asked: it proves that
// the harness works, looks at states, remembers each, and goes on where it was
// interrupted.
//
//	Options   what is under test, on which file systems, how many states
//	Run       gates, then round after round ──▶ Summary
//	Store     the directory where a campaign keeps what it knows
//	Replay    one state of a campaign, made again and mounted for a look
//
// # Gates
//
// Before anything else, containerd's built-in overlayfs must lose layers on
// every file system that is asked for, and, when durable-snapshotter is under
// test, each of its planted defects must be caught, and none must be found where
// none is awake. A campaign whose gates do not hold has proven nothing, whatever
// else it has found.
//
// # Rounds
//
// A round makes one recording for each file system, with a seed, a size of
// workload and mount options of its own, and looks at about as many states of
// each. Recordings are kept: the same seed makes the same layers, not the same
// log, and a state can be made again only from the log.
//
// # The directory
//
//	options.json   what the campaign was asked for, and the programs it tests
//	gates.jsonl    a line for each gate
//	results.jsonl  a line for each state
//	recordings/    logs, images and fingerprints, by the name of the recording
//	summary.txt    the counts
//	report.html    the same to look at
//
// A line is written when its state was looked at, so nothing but the state in
// progress is lost when the campaign is killed.
package campaign
