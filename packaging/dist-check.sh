#!/usr/bin/env bash
# What make dist-check does: make dist twice out of HEAD, in directories of different
# length, with another umask, time zone and locale, the second time with an empty build
# cache; then both results must be the same bytes.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${VERSION:?}" "${REVISION:?}" "${SOURCE_DATE_EPOCH:?}"
work=$(mktemp -d)
trap 'chmod -R u+w "$work" && rm -rf "$work"' EXIT
build() { # OUT DIR
	mkdir -p "$2"
	git archive HEAD | tar -x -C "$2"
	OUT=$1 "$2/packaging/dist.sh"
}
build "$work/first" "$work/a"
(
	umask 077
	export TZ=Asia/Kolkata LANG=C.UTF-8 GOCACHE="$work/cache"
	build "$work/second" "$work/another/directory"
)
diff "$work/first/SHA256SUMS" "$work/second/SHA256SUMS"
diff -rq "$work/first" "$work/second"
echo "the same bytes twice:"
cat "$work/first/SHA256SUMS"
