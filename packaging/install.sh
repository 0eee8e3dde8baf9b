#!/usr/bin/env bash
# What make install and make uninstall do:
#   BIN=FILE DESTDIR=DIR PREFIX=/usr/local install.sh install|uninstall
# make dist makes tarballs and packages out of what it installs.
set -euo pipefail
umask 022
cd "$(dirname "$0")/.."
: "${BIN:=bin/durable-snapshotter}" "${DESTDIR:=}" "${PREFIX:=/usr/local}" "${ZSHDIR:=share/zsh/site-functions}"
state=/var/lib/durable-snapshotter
doc=share/doc/durable-snapshotter

# Mode, source, and place below PREFIX.
files() {
	cat <<EOF
0755 $BIN bin/durable-snapshotter
0644 packaging/systemd/durable-snapshotter.service lib/systemd/system/durable-snapshotter.service
0644 packaging/systemd/durable-snapshotter.socket lib/systemd/system/durable-snapshotter.socket
0755 packaging/openrc/durable-snapshotter share/durable-snapshotter/openrc/durable-snapshotter
0644 packaging/generated/durable-snapshotter.8 share/man/man8/durable-snapshotter.8
0644 packaging/generated/durable-snapshotter.bash share/bash-completion/completions/durable-snapshotter
0644 packaging/generated/_durable-snapshotter $ZSHDIR/_durable-snapshotter
0644 packaging/generated/durable-snapshotter.fish share/fish/vendor_completions.d/durable-snapshotter.fish
0644 config.toml.example $doc/config.toml.example
0644 LICENSE $doc/copyright
EOF
}

# live reports whether this is an installation on a running machine with systemd.
live() { [ -z "$DESTDIR" ] && [ -d /run/systemd/system ] && command -v systemctl >/dev/null; }

case "${1-}" in
install)
	while read -r mode from to; do
		install -D -m "$mode" "$from" "$DESTDIR$PREFIX/$to"
	done < <(files)
	sed -i "s|/usr/bin/durable-snapshotter|$PREFIX/bin/durable-snapshotter|" \
		"$DESTDIR$PREFIX/lib/systemd/system/durable-snapshotter.service" \
		"$DESTDIR$PREFIX/share/durable-snapshotter/openrc/durable-snapshotter"
	gzip -9nf "$DESTDIR$PREFIX/share/man/man8/durable-snapshotter.8"
	if [ -z "$DESTDIR" ] && [ -x /sbin/openrc-run ]; then
		install -D -m 0755 "$PREFIX/share/durable-snapshotter/openrc/durable-snapshotter" /etc/init.d/durable-snapshotter
		echo "To start it, and at each boot: rc-update add durable-snapshotter default && rc-service durable-snapshotter start"
	fi
	if live; then
		systemctl daemon-reload
		echo "To start it, and at each boot: systemctl enable --now durable-snapshotter"
	fi
	;;
uninstall)
	if live; then
		systemctl disable --now durable-snapshotter.socket durable-snapshotter.service || true
	fi
	if [ -z "$DESTDIR" ] && [ -x /sbin/openrc-run ] && [ -e /etc/init.d/durable-snapshotter ]; then
		rc-service durable-snapshotter stop || true
		rc-update del durable-snapshotter || true
		rm -f /etc/init.d/durable-snapshotter
	fi
	while read -r _ _ to; do
		rm -f "$DESTDIR$PREFIX/$to" "$DESTDIR$PREFIX/$to.gz"
	done < <(files)
	for own in "$DESTDIR$PREFIX/$doc" "$DESTDIR$PREFIX/share/durable-snapshotter/openrc" "$DESTDIR$PREFIX/share/durable-snapshotter"; do
		[ ! -d "$own" ] || rmdir --ignore-fail-on-non-empty "$own"
	done
	if live; then
		systemctl daemon-reload
	fi
	if [ -e "$DESTDIR$state" ]; then
		echo "$DESTDIR$state is kept: containers may stand on its layers."
		echo "When containerd does not use it any more, remove it: rm -rf $DESTDIR$state"
	fi
	;;
*)
	echo "usage: install.sh install|uninstall" >&2
	exit 2
	;;
esac
