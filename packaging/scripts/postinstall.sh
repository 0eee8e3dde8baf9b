#!/bin/sh
# Of deb: configure [OLD VERSION]. Of rpm: the number of versions that are installed.
set -e
case "$1" in
configure) old=$2 ;;
1) old= ;;
2) old=installed ;;
*) exit 0 ;;
esac
command -v systemctl >/dev/null || exit 0
if [ -z "$old" ]; then
	systemctl enable durable-snapshotter.service >/dev/null 2>&1 ||
		echo "durable-snapshotter: not enabled; run: systemctl enable --now durable-snapshotter" >&2
fi
# Of an image that is being made, systemd does not run.
[ -d /run/systemd/system ] || exit 0
systemctl daemon-reload
if [ -z "$old" ]; then
	# Without waiting for recovery: the root of an earlier installation may be there.
	systemctl start --no-block durable-snapshotter.socket durable-snapshotter.service
	echo "durable-snapshotter: enabled and started. containerd uses it once its configuration does: durable-snapshotter(8)"
elif systemctl is-active --quiet durable-snapshotter.service || systemctl is-enabled --quiet durable-snapshotter.service; then
	# The sockets stay, and clients wait. Containers do not notice. After dpkg --remove,
	# which keeps the unit enabled, this starts it.
	systemctl restart durable-snapshotter.service ||
		echo "durable-snapshotter: not restarted; see: systemctl status durable-snapshotter" >&2
fi
