package tree

// SetReportsMounts makes the package take the kernel for one that does, or does not, report
// mount IDs.
func SetReportsMounts(v bool) { reportsMounts = v }
