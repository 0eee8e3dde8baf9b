#!/bin/sh
# A plugin of node-problem-detector: one line, and exit status 0 no problem, 1 a problem,
# 2 unknown. It requests what the daemon knows, and verifies and changes nothing.
#
#   durable-snapshotter.sh layers     are there damaged layers?
#   durable-snapshotter.sh daemon     does the daemon serve, and does it heal?
set -u
: "${DURABLE_SNAPSHOTTER=/opt/durable-snapshotter/bin/durable-snapshotter}"
: "${DURABLE_CONFIG=/etc/durable-snapshotter/config.toml}"

run() { "$DURABLE_SNAPSHOTTER" "$@" --config "$DURABLE_CONFIG" 2>&1; }
# count STATE: layers of the state in the answer.
count() { printf %s "$out" | grep -c "\"state\": \"$1\""; }

case ${1-} in
layers)
	out=$(run check --cached --json)
	case $? in
	0)
		echo "all layers are ready"
		exit 0
		;;
	1)
		echo "$(count damaged) layers are damaged, $(count healing) are being healed: run durable-snapshotter repair"
		exit 1
		;;
	3)
		# After an unclean shutdown, until each layer is verified.
		echo "$(count unverified) layers are not verified yet"
		exit 2
		;;
	esac
	echo "no answer about layers: $out"
	exit 2
	;;
daemon)
	if ! out=$(run health); then
		echo "no pod can start: $out"
		exit 1
	fi
	case $out in
	*"mending is stopped"*)
		echo "mending is stopped: run durable-snapshotter check"
		exit 1
		;;
	esac
	echo "durable-snapshotter serves"
	exit 0
	;;
esac
echo "usage: durable-snapshotter.sh layers|daemon"
exit 2
