#!/usr/bin/env bash
# What make dist does: for each of ARCHES a static binary, a tarball for /usr/local, a
# deb, an rpm and an SBOM (CycloneDX), with SHA256SUMS, into OUT. The bytes depend on
# the source, the Go release, VERSION, REVISION and SOURCE_DATE_EPOCH only; make
# dist-check verifies that.
set -euo pipefail
umask 022
cd "$(dirname "$0")/.."
: "${VERSION:?}" "${REVISION:?}" "${SOURCE_DATE_EPOCH:?}" "${OUT:?}" "${ARCHES:=amd64 arm64 armv7}" "${GO:=go}"
export LC_ALL=C TZ=UTC CGO_ENABLED=0 GOFLAGS=-trimpath GOAMD64=v1 GOARM64=v8.0 SOURCE_DATE_EPOCH
mkdir -p "$OUT"
out=$(cd "$OUT" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The version for dpkg and rpm: v1.2.0-rc.1 before v1.2.0 before what git describe
# gives for later commits. A commit without any tag is before all releases.
version=${VERSION#v}
[[ $version == [0-9]*.* ]] || version=0.0.0~g$version
PACKAGE_VERSION=$(sed -E 's/-([0-9]+)-g([0-9a-f]+)/+\1.g\2/; s/-dirty$/.dirty/; s/-/~/; s/-/./g' <<<"$version")
export PACKAGE_VERSION

"$GO" -C packaging build -o "$work/" ./sbom github.com/goreleaser/nfpm/v2/cmd/nfpm
cp -r packaging/scripts "$work/scripts"

# stage DIR PREFIX BINARY: what make install installs, with the time of the commit.
stage() {
	BIN=$3 DESTDIR=$1 PREFIX=$2 ZSHDIR=${ZSHDIR-share/zsh/site-functions} packaging/install.sh install
	find "$1" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
}

for arch in $ARCHES; do
	name=durable-snapshotter-$VERSION-linux-$arch
	case $arch in
	armv7) goarch=arm package_arch=arm7 ;;
	*) goarch=$arch package_arch=$arch ;;
	esac
	binary=$work/$arch/durable-snapshotter
	GOOS=linux GOARCH=$goarch GOARM=7 "$GO" build -buildvcs=false \
		-ldflags "-s -w -X main.version=$VERSION -X main.revision=$REVISION" -o "$binary" ./cmd/durable-snapshotter
	"$work/sbom" -version "$VERSION" "$binary" >"$out/$name.cdx.json"

	stage "$work/tar" /usr/local "$binary"
	tar -C "$work/tar/usr/local" --sort=name --format=gnu --owner=0 --group=0 --numeric-owner \
		--mtime="@$SOURCE_DATE_EPOCH" -cf - bin lib share | gzip -9n >"$out/$name.tar.gz"
	rm -rf "$work/tar"

	# Where zsh finds it depends on the distribution.
	for format in deb rpm; do
		ZSHDIR=share/zsh/site-functions
		[ $format = rpm ] || ZSHDIR=share/zsh/vendor-completions
		stage "$work/stage" /usr "$binary"
		(cd "$work" && ARCH=$package_arch ./nfpm package -f "$OLDPWD/packaging/nfpm.yaml" -p $format -t "$out/" >/dev/null)
		rm -rf "$work/stage"
	done
done
cd "$out"
rm -f SHA256SUMS
sha256sum -- durable-snapshotter* >"$work/SHA256SUMS"
mv "$work/SHA256SUMS" .
chmod 0644 SHA256SUMS
