// Package published is what the reports of all benchmarks have in common: where one was measured,
// the summary of measurements, and its table in a document.
package published
