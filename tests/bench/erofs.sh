#!/bin/sh
# Makes a directory with an mkfs.erofs that can read tars, as containerd's differ needs it. Where
# the machine's own can, the directory stays empty; else the program and its libraries come out
# of Debian 13, from the mirror that the machine uses. Nothing is installed.
set -eu
dir=$(realpath -m "$1")
rm -rf "$dir" "$dir.new"
mkdir -p "$dir.new"
cd "$dir.new"
if ! mkfs.erofs --help 2>&1 | grep -q -e '--tar='; then
	mirror=$(apt-get indextargets --format '$(REPO_URI)' | grep '/debian/*$' | head -n 1)
	mkdir -p lists/partial cache/archives/partial
	: >status
	echo "deb $mirror trixie main" >sources.list
	apt() {
		apt-get -qq -o Dir::Etc::sourcelist="$PWD/sources.list" -o Dir::Etc::sourceparts=/dev/null -o Dir::State::lists="$PWD/lists" \
			-o Dir::State::status="$PWD/status" -o Dir::Cache="$PWD/cache" -o APT::Sandbox::User=root "$@"
	}
	apt update
	apt download erofs-utils libc6 libuuid1 libselinux1 libpcre2-8-0 liblz4-1 liblzma5 libzstd1 libdeflate0 zlib1g libgcc-s1
	for deb in *.deb; do dpkg-deb -x "$deb" root; done
	rm -rf -- *.deb lists cache status sources.list
	loader=$(find root/usr/lib -name 'ld-linux*.so*' -path '*-linux-gnu*' | head -n 1)
	program=$(find root/usr/bin root/usr/sbin -name mkfs.erofs 2>/dev/null | head -n 1)
	# It is that release's loader that finds its libraries.
	printf '#!/bin/sh\nexec "%s" --library-path "%s" "%s" "$@"\n' "$dir/$loader" "$dir/$(dirname "$loader")" "$dir/$program" >mkfs.erofs
	chmod +x mkfs.erofs
fi
mv "$dir.new" "$dir"
PATH="$dir:$PATH" mkfs.erofs --help 2>&1 | grep -q -e '--tar='
