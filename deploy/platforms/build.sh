#!/bin/sh
# What make extensions does: the trees of system extensions for Talos and Flatcar, in OUT,
# out of BIN. They are laid out as the documentation of those systems has it, and were
# not tested on them: see docs/platforms.md.
set -eu
umask 022
cd "$(dirname "$0")/../.."
: "${OUT:=bin/extensions}" "${BIN:=bin/durable-snapshotter}" "${VERSION:=0.0.0}"
name=durable-snapshotter
rm -rf "$OUT"

talos=$OUT/talos
install -D -m 0755 "$BIN" "$talos/rootfs/usr/local/lib/containers/$name/$name"
install -D -m 0644 deploy/platforms/talos/config.toml "$talos/rootfs/usr/local/lib/containers/$name/etc/$name/config.toml"
install -D -m 0644 deploy/platforms/talos/service.yaml "$talos/rootfs/usr/local/etc/containers/$name.yaml"
install -D -m 0644 deploy/platforms/talos/cri.part "$talos/rootfs/etc/cri/conf.d/10-$name.part"
# Mount points in the container's read-only root.
for d in run var/lib; do mkdir -p "$talos/rootfs/usr/local/lib/containers/$name/$d"; done
sed "s|VERSION|$VERSION|" deploy/platforms/talos/manifest.yaml >"$talos/manifest.yaml"
printf 'FROM scratch\nCOPY manifest.yaml /\nCOPY rootfs /rootfs\n' >"$talos/Containerfile"

flatcar=$OUT/flatcar/$name
install -D -m 0755 "$BIN" "$flatcar/usr/bin/$name"
for unit in service socket; do
	install -D -m 0644 "packaging/systemd/$name.$unit" "$flatcar/usr/lib/systemd/system/$name.$unit"
done
install -D -m 0644 deploy/platforms/flatcar/upholds.conf "$flatcar/usr/lib/systemd/system/multi-user.target.d/10-$name.conf"
install -D -m 0644 deploy/platforms/flatcar/extension-release "$flatcar/usr/lib/extension-release.d/extension-release.$name"
if command -v mksquashfs >/dev/null; then
	mksquashfs "$flatcar" "$OUT/flatcar/$name.raw" -all-root -noappend -quiet
fi
