#!/bin/sh
# Of deb: remove, purge, upgrade and others. Of rpm: the number of versions that stay.
set -e
case "$1" in
remove | purge | 0) ;;
*) exit 0 ;;
esac
if [ "$1" = purge ]; then
	rm -f /etc/systemd/system/multi-user.target.wants/durable-snapshotter.service
	rm -f /etc/systemd/system/sockets.target.wants/durable-snapshotter.socket
fi
if [ -d /run/systemd/system ]; then
	systemctl daemon-reload
fi
root=/var/lib/durable-snapshotter
# dpkg --purge calls this for remove, too.
[ "$1" != purge ] && [ -e "$root" ] || exit 0
echo "durable-snapshotter: $root is kept: containers may stand on its layers." >&2
echo "When containerd does not use it any more, remove it: rm -rf $root" >&2
