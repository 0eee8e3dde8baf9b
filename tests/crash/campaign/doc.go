// Package campaign runs crash experiments until a number of states is reached: it proves that
// the harness works, examines states, records each, and goes on where it was
// interrupted.
//
//	Options   what is under test, on which file systems, how many states
//	Run       gates, then round after round ──▶ Summary
//	Store     the directory where a campaign keeps what it knows
//	Replay    one state of a campaign, made again and mounted, for examination by hand
//
// # Gates
//
// Before anything else, containerd's built-in overlayfs must lose layers on
// every file system of the campaign, and, when durable-snapshotter is under
// test, each of its planted defects must be caught, and none must be found where
// none is awake. A campaign whose gates do not hold has proven nothing, whatever
// else it has found.
//
// # Rounds
//
// A round makes one recording for each file system, with a seed, a size of
// workload and mount options of its own, and examines about as many states of
// each. The workload all takes the workloads in turn, one a round, each with the sizes and options
// that it would have alone. Recordings are kept: the same seed makes the same layers, not the same
// log, and a state can be made again only from the log.
//
// # The directory
//
//	options.json   the options of the campaign, and the programs it tests
//	gates.jsonl    a line for each gate
//	results.jsonl  a line for each state
//	recordings/    logs, images and fingerprints, by the name of the recording
//	summary.txt    the counts
//	report.html    the same for a browser
//
// A line is written when its state was examined, so nothing but the state in
// progress is lost when the campaign is killed.
package campaign
