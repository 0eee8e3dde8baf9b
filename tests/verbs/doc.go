// Package verbs tests the program as an operator meets it: the configuration and
// its flags, the situations in which the daemon must refuse to start, the start
// beside another process, check and its exit statuses, and systemd's notification.
// What check and repair find in damaged layers is in package damage.
//
//	go test -count=1 -v ./verbs -run 'TestCheck$'
package verbs
