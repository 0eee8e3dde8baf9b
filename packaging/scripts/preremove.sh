#!/bin/sh
# Of deb: remove, or upgrade NEW VERSION. Of rpm: the number of versions that stay.
set -e
case "$1" in
remove | 0) ;;
*) exit 0 ;;
esac
command -v systemctl >/dev/null || exit 0
if [ -d /run/systemd/system ]; then
	systemctl stop durable-snapshotter.socket durable-snapshotter.service || true
fi
# dpkg does it at a purge: what was removed can be installed again as it was.
if [ "$1" = 0 ]; then
	systemctl disable durable-snapshotter.service durable-snapshotter.socket >/dev/null 2>&1 || true
fi
