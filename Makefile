# make help lists the targets.

GO       ?= go
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo 0.0.0)
REVISION ?= $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
PREFIX   ?= /usr/local
LDFLAGS  := -s -w -X main.version=$(VERSION) -X main.revision=$(REVISION)

# Debian packages for the tests and the demonstration; the product needs none.
PACKAGES := runc mount procps e2fsprogs xfsprogs btrfs-progs fuse3 rsync strace mtree-netbsd gcc libc6-dev ca-certificates

# Those of make test-packages, beside them.
PACKAGES_TOOLS := debootstrap rpm groff-base zsh fish

# Those of make bench, beside them: containerd's rivals. What is missing is left out.
PACKAGES_BENCH := isal erofs-utils

STATICCHECK := $(GO) run honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOTESTSUM   := $(GO) run gotest.tools/gotestsum@v1.13.0
GOVULNCHECK := $(GO) run golang.org/x/vuln/cmd/govulncheck@v1.9.0

# Tests and the programs that they start are compiled in the same way, so that the
# compiler works once for both. It is most of the work of a fresh machine.
test test-configs test-crash test-every test-images demo storm lint bench bench-quick bench-compare fuzz test-packages test-node test-matrix test-upgrade soak: export CGO_ENABLED = 0
test test-configs test-crash test-every test-images demo storm lint bench bench-quick bench-compare fuzz test-packages test-node test-matrix test-upgrade soak: export GOFLAGS = -trimpath

.DEFAULT_GOAL := help
.PHONY: help build install deps demo test test-configs test-crash test-every test-images storm lint govulncheck fuzz bench bench-quick bench-compare clean generate uninstall dist dist-check test-packages node-image extensions test-node test-matrix test-upgrade soak

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## build bin/durable-snapshotter, static
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/durable-snapshotter ./cmd/durable-snapshotter

generate: build ## make the manual page and the completions again, after a change of the usage text
	bin/durable-snapshotter help | $(GO) -C packaging run ./usage -out generated

install: build ## install below PREFIX (default /usr/local): program, units, manual page, completions
	DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' packaging/install.sh install

uninstall: ## remove what install has installed; keeps the state, and prints where it is
	DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' packaging/install.sh uninstall

# A release: make dist VERSION=v1.2.0. The time in it is that of the commit. It is built with
# this Go, whichever is installed: the go command gets it out of the module proxy.
RELEASE_GO        := go1.26.11
ARCHES            ?= amd64 arm64 armv7
SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)
DIST = GOTOOLCHAIN=$(RELEASE_GO) VERSION='$(VERSION)' REVISION='$(REVISION)' SOURCE_DATE_EPOCH='$(SOURCE_DATE_EPOCH)' ARCHES='$(ARCHES)' GO='$(GO)'

dist: ## build a release into dist/: tarballs, deb, rpm, SBOM, SHA256SUMS; VERSION=v ARCHES='amd64 arm64 armv7'
	rm -rf dist
	$(DIST) OUT=dist packaging/dist.sh

dist-check: ## build it twice, out of HEAD, and compare the bytes
	$(DIST) packaging/dist-check.sh

deps: ## install the Debian packages that the tests and the demonstration need
	@missing=; for p in $(PACKAGES) $(MORE); do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; fi

demo: deps ## cut the power after a pull: the built-in overlayfs beside this one
	cd tests && $(GO) run ./cmd/demo

# One run over both modules, so that one list at its end names every test that
# was skipped, with its reason. Five packages at a time: most of them wait for
# disks, for digests of content and for containerd, more than they compute. The
# longest come first, so that none is left over at the end.
test: deps tests/.bin/promtool ## run all tests (root, real disks, a real containerd); lists what was skipped
	DURABLE_KIT_SUITE=$$(date +%s.%N) $(GOTESTSUM) --format pkgname-and-test-fails --raw-command -- sh -c \
		'$(GO) test -json -count=1 -p 5 -timeout 40m ./internal/contents ./internal/extract ./internal/seal ./... || bad=1; cd tests && $(GO) test -json -count=1 -p 5 -timeout 60m ./crash ./readiness ./commit ./damage ./overlay ./images ./noharm ./api ./configs ./matrix ./... || bad=1; exit $${bad:-0}'

# make test takes a part of what these packages enumerate: calls, kill points, failing
# requests, damages, nodes. What it takes of the states of a disk, make test-crash extends.
test-every: deps ## run the packages of which make test takes a part, whole; takes hours
	cd tests && DURABLE_TEST_EVERY=1 $(GO) test -count=1 -p 2 -timeout 5h ./crash ./readiness ./commit ./damage ./overlay ./images ./noharm ./api

# make test starts every text of docs/containerd.md with one release; this one
# starts it with all that it is for. Builds of releases stay in tests/.bin.
test-configs: deps ## start every documented configuration with every release of containerd
	cd tests && DURABLE_TEST_CONTAINERD=all $(GO) test -count=1 -timeout 60m -v ./configs

# make test covers all pairs of damage, place of good bytes, and use of an image.
test-images: deps ## damage images in every combination of damage, place of good bytes, and use; prints the table
	cd tests && $(GO) test -count=1 -timeout 60m -v ./images -run 'TestMatrix|TestSpots' -args -everything

# Machines with systemd and with OpenRC as process 1, out of debootstrap roots that
# stay in tests/.bin. README's commands for a new user are run there as they are printed.
test-packages: MORE := $(PACKAGES_TOOLS)
test-packages: deps ## install, upgrade and purge the packages on machines with systemd and OpenRC; follow README there
	cd tests && DURABLE_TEST_PACKAGES=1 $(GO) test -count=1 -timeout 60m -v ./packaging

# make test does it with containerd 2.0 and the newest. The first run compiles five
# releases and BuildKit, which takes half an hour; they stay in tests/.bin.
test-matrix: deps ## pull, run, power cut, heal, repair and CRI with every release of containerd, and BuildKit; prints README's table
	cd tests && DURABLE_TEST_CONTAINERD=all $(GO) test -count=1 -timeout 120m -v ./matrix
	cd tests && DURABLE_TEST_BUILDKIT=1 $(GO) test -count=1 -timeout 120m -v ./buildkit

# What a crash test of a given size takes from: make test-crash STATES=100000 SEED=7
STATES    ?= 10000
WORKLOAD  ?= api
UPGRADES  ?= 20
SEED      ?= 1
FS        ?= ext4,xfs,btrfs
comma     := ,
CRASH_DIR ?= /var/tmp/crashlab/$(WORKLOAD)-$(subst $(comma),-,$(FS))-$(SEED)

test-crash: deps ## cut the power in STATES states; WORKLOAD=api|differ|full|heal|all SEED=n FS=ext4,xfs,btrfs; goes on after an interrupt
	cd tests && mkdir -p .bin && CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -o .bin/crashlab ./crash/cmd/crashlab
	tests/.bin/crashlab run --states $(STATES) --workload $(WORKLOAD) --seed $(SEED) --fs $(FS) --state-dir $(CRASH_DIR) --resume

# Not part of make test: the kubelet takes 14 CPU minutes to compile on a fresh
# machine, after which it stays in tests/.bin, and the tests take 11 minutes, six
# of them for the kubelet's collection of images, which comes every five.
test-node: deps ## power cuts, damage, collection and start time under a real kubelet (builds one)
	cd tests && DURABLE_TEST_KUBELET=1 $(GO) test -count=1 -timeout 90m -v ./node

# make test replaces the program three times.
test-upgrade: deps ## replace the program under pulls and running pods, UPGRADES=20 times
	cd tests && $(GO) test -count=1 -timeout 60m -v ./upgrade -args -upgrades $(UPGRADES) -seed $(SEED)

# The short storm in make test is of the same kind: make storm ROUNDS=1000 SEED=7
ROUNDS      ?= 200
SNAPSHOTTER ?= durable
ACTORS      ?=

storm: deps ## everything at once against a real containerd; ROUNDS=n SEED=n FS=ext4,xfs,btrfs SNAPSHOTTER=durable|overlayfs ACTORS=[-]a,b GOON=1
	cd tests && $(GO) test -count=1 -timeout 0 -v ./storm -run TestStorm -args -every 10 -rounds $(ROUNDS) -seed $(SEED) -fs $(FS) -snapshotter $(SNAPSHOTTER) -actors=$(ACTORS) $(if $(GOON),-go-on)

HOURS ?= 1

soak: deps ## a storm of HOURS=n, after which nothing may be left; SEED=n FS=ext4,xfs,btrfs
	cd tests && $(GO) test -count=1 -timeout 0 -v ./storm -run TestStorm -args -every 50 -for $(HOURS)h -seed $(SEED) -fs $(FS)

lint: ## gofmt, go vet, staticcheck; a build for 32 bits
	@test -z "$$(gofmt -l . | tee /dev/stderr)"
	for dir in . tests packaging; do (cd $$dir && $(GO) vet ./... && $(STATICCHECK) ./...) || exit 1; done
	$(GO) vet -tags faults ./... && $(STATICCHECK) -tags faults ./...
	GOARCH=arm GOARM=7 $(GO) build ./...

# The database is made of its own module, so that the module proxy is all that is needed. Without
# it this fails: what could not be checked is not clean.
govulncheck: ## compare what a release and its packaging call with Go's database of vulnerabilities
	@export GOTOOLCHAIN=$(RELEASE_GO); db=$$(mktemp -d) && trap 'rm -rf "$$db"' EXIT && \
	source=$$($(GO) mod download -json golang.org/x/vulndb@latest | sed -n 's/^\t"Dir": "\(.*\)",$$/\1/p') && test -n "$$source" && \
	$(GO) run golang.org/x/vulndb/cmd/indexdb@latest -vulns "$$source/data/osv" -out "$$db" && echo "database: $$source" && \
	for dir in . packaging; do (cd $$dir && $(GOVULNCHECK) -db "file://$$db" ./...) || exit 1; done

# go test fuzzes one target at a time. A finding is left in testdata/fuzz beside its test, and
# is part of make test from then on.
FUZZTIME  ?= 1m
FUZZFLAGS ?=

# Go makes each input that finds something new shorter, for up to a minute: of slow targets
# nothing else would run.
fuzz: ## fuzz every decoder and the gRPC calls, one target after the other; FUZZTIME=5m FUZZFLAGS='-parallel 1'
	@bad=; for dir in $$(grep -rl --include='*_test.go' '^func Fuzz' . | xargs dirname | sort -u); do \
		for target in $$($(GO) -C $$dir test -list '^Fuzz' . | grep '^Fuzz'); do \
			echo "== $$dir $$target"; \
			$(GO) -C $$dir test . -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 2s $(FUZZFLAGS) || bad="$$bad $$dir:$$target"; \
		done; \
	done; test -z "$$bad" || { echo "found something:$$bad" >&2; exit 1; }

# docs/performance.md has the meaning of the figures. Other flags of go run ./cmd/bench run are
# given as BENCHFLAGS='--images tiny --variants overlayfs,durable'. FS and ROUNDS have defaults of their own here.
DISK       ?= fast
NEIGHBOR   ?=
OUT        ?= bin/bench
NAME       ?=
PROFILE    ?=
BASE       ?= HEAD
BENCHFLAGS ?=
bench_fs     = $(if $(filter file,$(origin FS)),ext4,$(FS))
bench_rounds = $(if $(filter file,$(origin ROUNDS)),$(1),$(ROUNDS))
bench_run    = cd tests && PATH="$(CURDIR)/tests/.bin/erofs:$$PATH" $(GO) run ./cmd/bench run --fs $(bench_fs) --disk $(DISK) --out $(abspath $(OUT)) \
	$(if $(NEIGHBOR),--neighbor $(NEIGHBOR)) $(if $(NAME),--name $(NAME)) $(if $(PROFILE),--profiles $(CURDIR)/bin/bench/profiles)

bench bench-quick bench-compare: MORE := $(PACKAGES_BENCH)

bench: deps tests/.bin/erofs ## benchmarks of parts, of single calls, of single layers and of boots, then whole pulls with every snapshotter; DISK=fast|250|emmc FS= NEIGHBOR=400 ROUNDS= OUT=docs/bench PROFILE=1
	$(GO) test -p 1 ./snapshotter ./storage ./internal/blobs ./internal/boltcheck ./internal/contents ./internal/seal -run '^$$' -bench . -benchmem
	cd tests && $(GO) test ./bench -run '^$$' -bench . -benchtime 3x
	cd tests && $(GO) run ./cmd/bench paths --fs $(bench_fs) --out $(abspath $(OUT))
	cd tests && $(GO) run ./cmd/bench layers --fs $(bench_fs) --out $(abspath $(OUT))
	cd tests && $(GO) run ./cmd/bench boot --fs $(bench_fs) --disk $(DISK) --out $(abspath $(OUT))
	$(bench_run) --rounds $(call bench_rounds,10) $(BENCHFLAGS)

bench-quick: deps ## whole pulls of small images in under 5 minutes, with the main variants
	$(bench_run) --rounds $(call bench_rounds,3) --name $(or $(NAME),quick) --scale 8 --images golang,tiny,zstd --variants overlayfs,durable,durable-differ --unpacks 1 --igzip no $(BENCHFLAGS)

bench-compare: deps ## whole pulls with this tree's daemon and with that of revision BASE, in turn: ratios, and whether they are noise
	$(bench_run) --rounds $(call bench_rounds,10) --name $(or $(NAME),compare) --base '$(BASE)' --images golang,tiny --variants durable,durable-differ --unpacks 1 --igzip no $(BENCHFLAGS)

# containerd's differ for erofs needs mkfs.erofs 1.7, and Debian 12 has 1.5: there it is Debian
# 13's, with that release's libraries, and nothing is installed.
tests/.bin/erofs:
	tests/bench/erofs.sh $@ || echo "mkfs.erofs is not there: containerd's erofs snapshotter is not measured" >&2

node-image: build ## the context of the image for deploy/, in bin/node-image
	deploy/node-image.sh

extensions: build ## system extensions for Talos and Flatcar, in bin/extensions; not tested there
	VERSION=$(VERSION) deploy/platforms/build.sh

# Out of Debian's package prometheus, for the tests of alerts: 19 MB to download once, of
# which one program is needed; nothing is installed. Without it these tests are skipped, and
# make test lists them.
tests/.bin/promtool:
	@mkdir -p tests/.bin
	@cd tests/.bin && { apt-get -qq -o APT::Sandbox::User=root download prometheus || \
		{ apt-get -qq update && apt-get -qq -o APT::Sandbox::User=root download prometheus; }; } && \
		dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x --strip-components=3 -m ./usr/bin/promtool && rm prometheus_*.deb || \
		echo "promtool is not there: alerts are not tested" >&2

clean: ## remove what was built
	rm -rf bin dist tests/.bin
