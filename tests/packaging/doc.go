// Package packaging tests what is installed: units, scripts, packages, the manual page
// and the completions.
//
// installed_test.go needs no machine: files are in step with the program, and shells,
// systemd and groff accept them. release_test.go builds a release and verifies what is
// in it. systemd_test.go installs, upgrades and purges the deb on a machine with systemd
// as process 1 and containerd; openrc_test.go starts the tarball's daemon on one with
// OpenRC; path_test.go follows README.md on machines with systemd, from the installation to
// the way back. The last four need DURABLE_TEST_PACKAGES=1: make test-packages.
package packaging
