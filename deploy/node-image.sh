#!/bin/sh
# What make node-image does: the context of the Containerfile, in OUT. The shell is that of
# Debian's package busybox-static; BUSYBOX names another static busybox, for another machine.
set -eu
cd "$(dirname "$0")/.."
: "${OUT:=bin/node-image}" "${BIN:=bin/durable-snapshotter}" "${BUSYBOX:=}"
rm -rf "$OUT"
mkdir -p "$OUT/bin" "$OUT/files"
if [ -z "$BUSYBOX" ]; then
	work=$(mktemp -d)
	trap 'rm -rf "$work"' EXIT
	(cd "$work" && apt-get -q -o APT::Sandbox::User=root download busybox-static && dpkg-deb -x busybox-static_*.deb .) >/dev/null
	BUSYBOX=$work/bin/busybox
	[ -e "$BUSYBOX" ] || BUSYBOX=$work/usr/bin/busybox
fi
install -m 0755 "$BUSYBOX" "$OUT/bin/busybox"
install -m 0755 "$BIN" "$OUT/files/durable-snapshotter"
install -m 0644 packaging/systemd/durable-snapshotter.service packaging/systemd/durable-snapshotter.socket "$OUT/files/"
install -m 0644 deploy/Containerfile "$OUT/Containerfile"
echo "podman build -t REGISTRY/durable-snapshotter-node:VERSION $OUT"
