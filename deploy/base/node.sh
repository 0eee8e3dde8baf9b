#!/bin/sh
# Installs durable-snapshotter on the host of this pod, as a unit of the host's systemd,
# and has containerd use it, as far as STAGE allows. The daemon never runs in the pod:
# its end must not depend on pods, nor the start of pods on a pod.
#
#   node.sh install     what the DaemonSet runs: the stages up to STAGE, then it waits
#   node.sh ready       its readiness: all of that is done, and the daemon serves
#   node.sh back        containerd returns to OLD; the snapshotter stays registered
#   node.sh remove      containerd forgets the snapshotter, then the unit is removed
#
# Each step is skipped when its effect is there already, so that a new pod, or a
# repeated one, changes nothing. containerd is restarted only when what runs lacks us,
# and once for each text: a configuration that does not help is no reason to do it again.
set -eu

: "${HOST=/host}"                                # where the root of the host is mounted
: "${ENTER=nsenter -t 1 -m -u -i -n -p --}"      # runs a command on the host
: "${FILES=/files}"                              # binary and units, of the image
: "${PLATFORM=/platform}"                        # texts for this platform, of the ConfigMap
: "${STAGE=install}"                             # install, register or switch
: "${UNITS=containerd.service}"                  # containerd is in the first that is active
: "${MAIN=}"                                     # its configuration, as far as it must import REGISTER
: "${REGISTER=}" "${SWITCH=}"                    # where the texts go, on the host
: "${TEMPLATE=}"                                 # in place of both: a file that is edited
: "${CRICTL=crictl}"                             # on the host
: "${OLD=overlayfs}"                             # the snapshotter before this one
: "${METRICS_ADDRESS=}"                          # for a configuration of the daemon that is written here
: "${ALLOW_PULL=}"                               # not empty: switch although images need a pull
: "${FRESH_MINUTES=60}"                          # a machine that has been up for less is a new node
: "${PATIENCE=300}"                              # seconds to wait for a daemon or for containerd
: "${READY=/tmp/ready}"                          # of this pod

name=durable-snapshotter
dir=/opt/$name                # /usr is read-only on some systems
bin=$dir/bin/$name
state=/var/lib/$name-node     # which stages are done, and which texts containerd was restarted for
config=/etc/$name/config.toml
units=/etc/systemd/system
tmp=${READY%/*}               # of this pod, too
managed="# Written by the DaemonSet $name. Without this line the file is left alone."

log() { echo "$(date -u +%Y-%m-%dT%H:%M:%SZ) $*" >&2; }
fail() { log "error: $*"; exit 1; }
host() { $ENTER "$@"; }

# put SOURCE FILE MODE: the host's FILE becomes SOURCE, whole or not at all, whatever
# happens to the power. wrote is empty when it was the same already.
put() {
	wrote=
	if cmp -s "$1" "$HOST$2"; then
		return
	fi
	mkdir -p "$HOST$(dirname "$2")"
	cp "$1" "$HOST$2.new"
	chmod "$3" "$HOST$2.new"
	sync "$HOST$2.new"
	mv "$HOST$2.new" "$HOST$2"
	sync "$HOST$(dirname "$2")"
	wrote=1
	log "wrote $2"
}

# mark NAME TEXT records what is done on this node.
mark() {
	echo "$2" >"$tmp/mark"
	put "$tmp/mark" "$state/$1" 0644
}
marked() { [ "$(cat "$HOST$state/$1" 2>/dev/null)" = "$2" ]; }

# within WHAT COMMAND...: the command succeeds before PATIENCE is over.
within() {
	what=$1 left=$PATIENCE
	shift
	until "$@"; do
		[ "$left" -gt 0 ] || fail "$what: not within $PATIENCE s"
		left=$((left - 1))
		sleep 1
	done
}

healthy() { host "$bin" health >/dev/null 2>&1; }

# The unit that containerd runs in.
unit_of() {
	for u in $UNITS; do
		if host systemctl is-active --quiet "$u"; then
			echo "$u"
			return
		fi
	done
	fail "none of the units is active: $UNITS"
}

# registered reports whether the running containerd knows this snapshotter: only then
# an image that does not exist is what is missing. 0 yes, 1 no, 2 no answer.
registered() {
	out=$(host "$bin" check --images $name.invalid/none 2>&1) || true
	case $out in
	*"there is no image"*) return 0 ;;
	*"does not know this snapshotter"*) return 1 ;;
	esac
	return 2
}

# answers reports whether containerd does, and leaves what registered has returned in known.
answers() {
	known=0
	registered || known=$?
	[ $known != 2 ]
}

# effective reports whether the CRI plugin of the running containerd uses it: 0 yes, 1 no,
# 2 there is no crictl to find out.
effective() {
	# shellcheck disable=SC2086 # k3s has "k3s crictl"
	out=$(host $CRICTL imagefsinfo 2>&1) || {
		case $out in
		*"No such file or directory"* | *"can't execute"* | *"failed to execute"*) return 2 ;;
		esac
		return 1
	}
	case $out in
	*"/var/lib/$name"*) return 0 ;;
	esac
	return 1
}

sum_of() { printf %s "$1" | sha256sum | cut -c 1-64; }

# restart STAGE TEXT: containerd reads its configuration, at most once for each text.
restart() {
	sum=$(sum_of "$2")
	if marked "restarted-$1" "$sum"; then
		fail "containerd was restarted for this configuration, and does not use it. Nothing is restarted again. See docs/containerd.md; after the cure: rm $state/restarted-$1"
	fi
	unit=$(unit_of)
	mark "restarted-$1" "$sum"
	log "restarting $unit; containers go on"
	host systemctl restart "$unit"
}

# --- install -----------------------------------------------------------------

install_files() {
	# A package of the distribution installs and upgrades itself.
	for d in /usr/lib/systemd/system /lib/systemd/system /usr/local/lib/systemd/system; do
		[ ! -e "$HOST$d/$name.service" ] || fail "$d/$name.service exists: this node has a package of $name. Remove one of the two"
	done
	changed=
	if [ -e "$HOST$bin" ] && ! cmp -s "$FILES/$name" "$HOST$bin"; then
		put "$HOST$bin" "$bin.previous" 0755
	fi
	put "$FILES/$name" "$bin" 0755
	changed=$changed$wrote
	sed "s|^ExecStart=[^ ]*/$name|ExecStart=$bin|" "$FILES/$name.service" >"$tmp/service"
	put "$tmp/service" "$units/$name.service" 0644
	changed=$changed$wrote
	daemon_config
	changed=$changed$wrote
	put "$FILES/$name.socket" "$units/$name.socket" 0644
	socket_changed=$wrote
	if [ -d "$HOST/usr/local/bin" ] && [ ! -e "$HOST/usr/local/bin/$name" ]; then
		ln -sf "$bin" "$HOST/usr/local/bin/$name" 2>/dev/null || true # /usr may be read-only
	fi
}

# daemon_config writes the daemon's configuration if there is none, or one from here.
daemon_config() {
	wrote=
	if [ -e "$HOST$config" ] && [ "$(head -n 1 "$HOST$config")" != "$managed" ]; then
		log "$config is left alone"
		return
	fi
	{
		echo "$managed"
		cat "$PLATFORM/config.toml"
		if [ -n "$METRICS_ADDRESS" ]; then
			printf '[admin]\nmetrics_address = "%s"\n' "$METRICS_ADDRESS"
		fi
	} >"$tmp/config"
	put "$tmp/config" "$config" 0644
}

start_daemon() {
	host systemctl daemon-reload
	if host systemctl is-active --quiet $name.service; then
		# The sockets stay, and clients wait, unless their unit has changed.
		if [ -n "$socket_changed" ]; then
			host systemctl stop $name.service $name.socket
		elif [ -n "$changed" ]; then
			host systemctl restart $name.service || log "$name.service did not start"
		fi
	fi
	host systemctl enable --now $name.socket $name.service || log "$name.service did not start"
	left=$PATIENCE
	until healthy; do
		if [ "$left" -le 0 ]; then
			previous
			fail "the daemon does not serve: journalctl -u $name"
		fi
		left=$((left - 1))
		sleep 1
	done
}

# previous puts the earlier binary back: an older version refuses what a newer one has
# written, and touches nothing.
previous() {
	[ -e "$HOST$bin.previous" ] && [ -n "$changed" ] || return 0
	log "the earlier binary is put back"
	put "$HOST$bin.previous" "$bin" 0755
	host systemctl restart $name.service || true
}

# --- register ----------------------------------------------------------------

# imports reports whether containerd's main file imports the directory of REGISTER.
imports() {
	[ -n "$MAIN" ] || return 0
	[ -e "$HOST$MAIN" ] && grep -Eq "^ *imports *=.*['\"]$(dirname "$REGISTER")/\*\.toml['\"]" "$HOST$MAIN" &&
		grep -Eq '^ *version *= *[34] *$' "$HOST$MAIN"
}

register() {
	if [ -n "$TEMPLATE" ]; then
		[ -e "$HOST$TEMPLATE" ] || fail "$TEMPLATE is missing"
		if ! grep -q "^# BEGIN $name" "$HOST$TEMPLATE"; then
			version=$(sed -n 's/^ *version *= *\([0-9]\).*/\1/p' "$HOST$TEMPLATE" | head -n 1)
			[ "$version" != 4 ] || version=3 # the same tables
			[ -e "$PLATFORM/register.v$version.toml" ] || fail "$TEMPLATE has the version \"$version\": nothing here fits it"
			{
				cat "$HOST$TEMPLATE"
				echo "# BEGIN $name"
				cat "$PLATFORM/register.v$version.toml"
				echo "# END $name"
			} >"$tmp/template"
			put "$tmp/template" "$TEMPLATE" 0644
		fi
	else
		imports || fail "$MAIN does not import $(dirname "$REGISTER")/*.toml, or is not of version 3 or 4: see docs/containerd.md. Nothing of containerd's was changed"
		put "$PLATFORM/register.toml" "$REGISTER" 0644
	fi
	within "containerd answers" answers
	if [ $known != 0 ]; then
		restart register "$(cat "$PLATFORM"/register*)"
		within "containerd has the snapshotter durable" registered
	fi
	mark register done
}

# --- switch ------------------------------------------------------------------

# new reports whether no pod of this cluster has been here for long: then the stages of
# all nodes need not be waited for.
new() {
	up=$(cut -d . -f 1 "$HOST/proc/uptime")
	[ "$up" -lt $((FRESH_MINUTES * 60)) ]
}

migrate() {
	status=0
	host "$bin" migrate "$@" || status=$?
	case $status in
	0) ;;
	1) [ -n "$ALLOW_PULL" ] || fail "some images are not complete on this node, see above: pull them, or set ALLOW_PULL=yes to have them pulled when a pod needs them" ;;
	*) fail "migrate has ended with status $status: nothing was switched" ;;
	esac
}

# edit EXPRESSION: the template, by sed.
edit() {
	sed "$1" "$HOST$TEMPLATE" >"$tmp/template"
	put "$tmp/template" "$TEMPLATE" 0644
}

switch_config() {
	if [ -z "$TEMPLATE" ]; then
		put "$PLATFORM/switch" "$SWITCH" 0644
		return
	fi
	# shellcheck disable=SC2016 # the variable is the template's
	edit 's/^\( *snapshotter *= *\)"${SNAPSHOTTER}"/\1"durable"/'
	# The block from here has one such line for each list of unpack_config.
	sed "/^# BEGIN $name/,/^# END $name/d" "$HOST$TEMPLATE" | grep -Eq '^ *snapshotter *= *"durable"' ||
		fail "$TEMPLATE has no line snapshotter = \"\${SNAPSHOTTER}\""
}

switch_over() {
	cri=0
	effective || cri=$?
	text=$(cat "$PLATFORM/switch")
	if [ $cri = 0 ] || { [ $cri = 2 ] && marked restarted-switch "$(sum_of "$text")"; }; then
		mark switch done
		return
	fi
	# Images first: a pause image that is missing keeps every pod from starting.
	migrate
	switch_config
	restart switch "$text"
	within "containerd has the snapshotter durable" registered
	if [ $cri = 2 ]; then
		log "there is no crictl: verify the effect with durable-snapshotter doctor, or as in docs/containerd.md"
	else
		within "the CRI plugin uses /var/lib/$name" effective
	fi
	mark switch done
}

install() {
	[ -d "$HOST/run/systemd/system" ] || fail "the host does not run systemd; its packages have a script for OpenRC"
	rm -f "$READY"
	install_files
	start_daemon
	log "the daemon serves"
	case $STAGE in
	install) ;;
	register) register ;;
	switch)
		# A DaemonSet makes the pods of all nodes at once; only its updates go from node
		# to node. So a node that is in use is restarted by an update only.
		marked register done || new || fail "STAGE is switch, and this node in use has not been through register: apply the stages install and register first, each to its end"
		register
		switch_over
		;;
	*) fail "STAGE=$STAGE: want install, register or switch" ;;
	esac
	log "stage $STAGE is complete"
	: >"$READY"
}

# --- the way back ------------------------------------------------------------

back() {
	healthy || fail "the daemon does not serve: journalctl -u $name"
	registered || fail "containerd does not know this snapshotter: there is nothing to go back from; see node.sh remove"
	migrate --to "$OLD"
	if [ -n "$TEMPLATE" ]; then
		# shellcheck disable=SC2016
		edit "/^# BEGIN $name/,/^# END $name/!"'s/^\( *snapshotter *= *\)"durable"/\1"${SNAPSHOTTER}"/'
	else
		rm -f "$HOST$SWITCH"
	fi
	cri=0
	effective || cri=$?
	if [ $cri = 0 ] || { [ $cri = 2 ] && marked switch done; }; then
		rm -f "$HOST$state/restarted-back"
		restart back "$OLD"
		within "containerd has the snapshotter durable" registered
	fi
	rm -f "$HOST$state/switch" "$HOST$state/restarted-switch"
	log "new pods use $OLD. When all old ones are gone (kubectl drain, then uncordon), run remove"
}

remove() {
	if [ ! -e "$HOST$bin" ] && [ ! -e "$HOST$units/$name.service" ]; then
		log "not installed"
		return
	fi
	marked remove begun || releasable
	mark remove begun
	if [ -n "$TEMPLATE" ]; then
		edit "/^# BEGIN $name/,/^# END $name/d"
	else
		rm -f "$HOST$REGISTER" "$HOST$SWITCH"
	fi
	if registered; then
		rm -f "$HOST$state/restarted-remove"
		restart remove ""
	fi
	host systemctl disable --now $name.service $name.socket || true
	rm -f "$HOST$units/$name.service" "$HOST$units/$name.socket"
	host systemctl daemon-reload
	if [ "$(readlink "$HOST/usr/local/bin/$name" 2>/dev/null)" = "$bin" ]; then
		rm -f "$HOST/usr/local/bin/$name"
	fi
	rm -rf "$HOST$dir" "$HOST$state"
	log "removed. $config and /var/lib/$name are kept"
}

# releasable ends the script unless no container needs the daemon any more.
releasable() {
	within "the daemon serves, which alone knows what is in use" healthy
	within "containerd answers, which alone knows what is in use" answers
	[ $known = 0 ] || return 0
	cri=0
	effective || cri=$?
	[ $cri != 0 ] || fail "the CRI plugin uses this snapshotter: run back first"
	[ $cri = 1 ] || ! marked switch done || fail "this node was switched: run back first"
	migrate --to "$OLD" --finish
	within "containers let go of the snapshots (recreate their pods, and run this again; nothing was removed)" unused
}

# unused reports whether the daemon has no snapshot.
unused() {
	host "$bin" inspect --json >"$tmp/inspect" && ! grep -q '"kind":' "$tmp/inspect"
}

case ${1-} in
install)
	install
	# Signals end the pod at once, and leave the host alone.
	trap 'exit 0' TERM INT
	[ -n "${ONCE-}" ] || while :; do sleep 3600 & wait $!; done
	;;
ready) [ -e "$READY" ] && healthy ;;
back) back ;;
remove) remove ;;
*)
	echo "usage: node.sh install|ready|back|remove" >&2
	exit 2
	;;
esac
