# Everything is built into .venv/ and build/ of this checkout, except distribution packages (make deps).
#
#   make demo [ARGS=--json]   run two agents, a guest and a migration on this machine, and verify the guest's memory
#   make test                 linters, C tests (with and without sanitizers), fuzzers, Python tests
#   make check                linters and type checks only
#   make test-interop         guest tests on the QEMU of Debian 12, 13 and sid, installed into trees
#   make test-packages        install, upgrade and remove the packages on Debian 12 and 13; the Dockerfile's steps in a chroot
#   make venv                 build and install into .venv
#   make install              install the agents below PREFIX (/usr/local), configuration and units included; DESTDIR is for packagers
#   make deb | wheel          build packages into build/dist: Debian's (SUITE=bookworm|trixie), or a wheel and an sdist
#   make sbom | lock          list what the agents consist of | resolve their requirements anew
#   make pictures             the recording and the picture of README.md, from migrations on this machine
#   make bench | soak         compare with QEMU and iperf3 | random failures for SOAK_SECONDS
#   make docs | site          write the generated parts of docs/ anew | build docs/ as a site into build/site
#   make simulate             SIMULATIONS schedules of random failures in virtual time, starting at SIMULATION_FIRST
#   make clean                remove everything that was built
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := venv

ARGS ?=
PYTEST_ARGS ?=
FUZZ_SECONDS ?= 20
SOAK_SECONDS ?= 600
SIMULATIONS ?= 200000
SIMULATION_FIRST ?= 1000000
JOBS ?= $(shell nproc)

VENV := .venv
BIN := $(VENV)/bin
STAMPS := build/stamps
# Serialize builds in this checkout.
LOCK := flock build/lock
# Guest images (Debian's kernel, our init) are kept in the checkout, too.
export MIGRATED_CACHE ?= $(CURDIR)/build/cache

NATIVE := $(shell find native -name '*.[ch]' -not -path '*/examples/*') native/CMakeLists.txt native/build_ffi.py
CORE := $(wildcard native/src/*.[ch] native/include/mgd_api.h native/include/migrated.h) \
	native/CMakeLists.txt native/build_ffi.py
C_FORMATTED := $(wildcard native/src/*.[ch] native/include/*.h native/tests/*.[ch] native/fuzz/*.[ch] \
	native/fuzz/*/*.[ch] native/examples/*.[ch])

.PHONY: deps venv demo check test test-native test-asan test-tsan fuzz test-python test-interop test-packages bench docs site soak simulate pictures clean always \
	wheel deb install sbom lock

# ---------------------------------------------------------------- distribution packages

# package:program, or package:file, which exists if the package is installed
PACKAGES := \
	gcc:gcc libc6-dev:/usr/include/stdio.h cmake:cmake ninja-build:ninja \
	libzstd-dev:/usr/include/zstd.h libssl-dev:/usr/include/openssl/ssl.h \
	python3:python3 python3-venv:/usr/share/doc/python3-venv python3-dev:/usr/share/doc/python3-dev \
	util-linux:flock
# For real guests.  If they are missing and cannot be installed, the demo says so and migrates a co-operative guest.
GUEST_PACKAGES := iproute2:ip qemu-system-x86:qemu-system-x86_64
# Only for `make test` and `make bench`.
TEST_PACKAGES := clang:clang libclang-rt-dev:/usr/share/doc/libclang-rt-dev clang-format:clang-format iperf3:iperf3 \
	dpkg-dev:dpkg-shlibdeps systemd:systemd-analyze openssl:openssl systemd-container:systemd-nspawn mmdebstrap:mmdebstrap \
	libvirt-daemon-system:libvirtd libvirt-daemon-driver-qemu:/usr/share/doc/libvirt-daemon-driver-qemu \
	libvirt-clients:virsh chromium:chromium prometheus:promtool python3-libvirt:/usr/lib/python3/dist-packages/libvirt.py

deps:
	@.ci/deps $(PACKAGES) $(GUEST_PACKAGES) $(if $(WITHOUT_TEST_PACKAGES),,$(TEST_PACKAGES))

# `make demo` does not need the packages of the tests.
$(STAMPS)/deps: Makefile .ci/deps
	@mkdir -p $(STAMPS)
	@.ci/deps $(PACKAGES) -- $(GUEST_PACKAGES)
	@touch $@

$(STAMPS)/test-deps: Makefile .ci/deps
	@mkdir -p $(STAMPS)
	@.ci/deps $(PACKAGES) $(GUEST_PACKAGES) $(TEST_PACKAGES)
	@touch $@

# ---------------------------------------------------------------- .venv

# The interpreter is Debian's, or the first python3 that is new enough and has its headers.
$(STAMPS)/venv: pyproject.toml .ci/venv | $(STAMPS)/deps
	@mkdir -p $(STAMPS)
	@$(LOCK) .ci/venv $(VENV)
	@touch $@

# The editable install knows every module by its path: it is made again when one is new, has moved or is gone.
$(STAMPS)/modules: always
	@mkdir -p $(STAMPS)
	@find migrated -name '*.py' | sort >$@.new
	@cmp --silent $@.new $@ && rm $@.new || mv $@.new $@

# Editable: Python sources are used in place, and the C core is rebuilt when it changes.
$(STAMPS)/installed: $(STAMPS)/venv $(STAMPS)/modules $(CORE)
	@$(LOCK) $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

venv: $(STAMPS)/installed

# ---------------------------------------------------------------- for users

demo: $(STAMPS)/installed
	@$(BIN)/migrated demo $(ARGS)

bench: $(STAMPS)/installed $(STAMPS)/test-deps
	$(BIN)/python -m benchmarks $(ARGS)

docs: $(STAMPS)/installed
	$(BIN)/python -m tests.rig.error_codes
	$(BIN)/python -m tests.rig.documented_keys
	$(BIN)/python -m docs.site.diagrams

site: $(STAMPS)/installed
	$(BIN)/python -m docs.site build/site

pictures: $(STAMPS)/installed $(STAMPS)/test-deps
	$(BIN)/python docs/img/record.py docs/img/demo.svg make -s demo
	$(BIN)/python -m docs.img.dashboard docs/img/dashboard.png

soak: $(STAMPS)/installed
	$(BIN)/python -m tests.faults.soak --seconds $(SOAK_SECONDS) $(if $(SOAK_SEED),--seed $(SOAK_SEED)) $(ARGS)

simulate: $(STAMPS)/installed
	$(BIN)/python -m tests.simulation --schedules $(SIMULATIONS) --first $(SIMULATION_FIRST) $(ARGS)

# ---------------------------------------------------------------- tests

check: $(STAMPS)/installed $(STAMPS)/test-deps
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	clang-format --dry-run -Werror $(C_FORMATTED)

test: check test-native test-asan test-tsan fuzz test-python

test-native: | $(STAMPS)/test-deps
	@mkdir -p build
	cmake -S native -B build/plain -G Ninja -DMGD_TESTS=ON --log-level=WARNING
	cmake --build build/plain --parallel $(JOBS)
	ctest --test-dir build/plain --output-on-failure --no-tests=error

test-asan: | $(STAMPS)/test-deps
	cmake -S native -B build/asan -G Ninja -DMGD_TESTS=ON -DMGD_SANITIZE=address,undefined --log-level=WARNING
	cmake --build build/asan --parallel $(JOBS)
	ctest --test-dir build/asan --output-on-failure --no-tests=error

# ThreadSanitizer, on all of them: what needs many threads starts more than this machine has processors.  die_after_fork=0: the
# helper process of an injection shares our memory, and the runtime takes it for a fork, after which it would let nobody start
# a thread.
test-tsan: | $(STAMPS)/test-deps
	cmake -S native -B build/tsan -G Ninja -DMGD_TESTS=ON -DMGD_SANITIZE=thread --log-level=WARNING
	cmake --build build/tsan --parallel $(JOBS)
	TSAN_OPTIONS=die_after_fork=0 setarch --addr-no-randomize ctest --test-dir build/tsan --output-on-failure --no-tests=error

fuzz: | $(STAMPS)/test-deps
	CC=$$(command -v clang || command -v gcc) cmake -S native -B build/fuzz -G Ninja -DMGD_FUZZ=ON \
		-DMGD_SANITIZE=address,undefined --log-level=WARNING
	cmake --build build/fuzz --parallel $(JOBS)
	@mkdir -p build/fuzz/corpus
	@for fuzzer in build/fuzz/fuzz_*; do \
		[[ -x $$fuzzer && -f $$fuzzer ]] || continue; \
		echo "$$fuzzer: $(FUZZ_SECONDS) s"; \
		mkdir -p build/fuzz/corpus/$${fuzzer##*/}; \
		timeout $$(($(FUZZ_SECONDS) + 60)) $$fuzzer -max_total_time=$(FUZZ_SECONDS) -verbosity=0 -print_final_stats=1 \
			-artifact_prefix=build/fuzz/ build/fuzz/corpus/$${fuzzer##*/} native/fuzz/corpus/$${fuzzer##*/}; \
	done

test-python: $(STAMPS)/installed $(STAMPS)/test-deps $(STAMPS)/builder
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# QEMU versions other than this machine's: Debian releases as trees in the cache (tests/rig/trees.py).
SUITES ?= bookworm trixie sid

test-interop: $(STAMPS)/installed $(STAMPS)/test-deps
	$(BIN)/python -m tests.rig.trees $(SUITES)
	@for suite in $(SUITES); do \
		echo "guest tests on the QEMU of $$suite"; \
		MIGRATED_QEMU=$(MIGRATED_CACHE)/trees/$$suite/qemu-system-x86_64 \
			$(BIN)/python -m pytest $(PYTEST_ARGS) tests/guests --ignore=tests/guests/test_versions.py; \
	done
	$(BIN)/python -m pytest $(PYTEST_ARGS) tests/guests/test_versions.py

# ---------------------------------------------------------------- packages

DIST := build/dist
BUILDER := build/builder
PREFIX ?= /usr/local
DESTDIR ?=
SUITE ?=

# Equal sources make equal packages.
wheel deb install sbom: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || stat --format=%Y pyproject.toml)

# What builds the packages: every file of it is checked against its hash.
$(STAMPS)/builder: package/build.lock .ci/venv .ci/deps
	@mkdir -p $(STAMPS)
	@.ci/deps $(PACKAGES)
	@$(LOCK) .ci/venv $(BUILDER) package/build.lock
	@touch $@

# The wheel is built from the sdist.
build/wheel: always $(STAMPS)/builder
	@rm -rf $@
	$(BUILDER)/bin/python -m build --no-isolation --outdir $@ . >build/wheel.log 2>&1 || { cat build/wheel.log; exit 1; }

# The distribution's zstd and OpenSSL are used, and updated, as they are: the wheel has no copies of them.
wheel: build/wheel
	@mkdir -p $(DIST)
	@rm -f $(DIST)/*.whl $(DIST)/*.tar.gz
	PATH=$(BUILDER)/bin:$$PATH $(BUILDER)/bin/auditwheel repair --exclude libzstd.so.1 --exclude libssl.so.3 \
		--exclude libcrypto.so.3 --wheel-dir $(DIST) build/wheel/*.whl
	cp build/wheel/*.tar.gz $(DIST)

deb: build/wheel
	@.ci/deps dpkg-dev:dpkg-shlibdeps
	$(BUILDER)/bin/python -m package.deb --wheel build/wheel/*.whl --output $(DIST) $(if $(SUITE),--suite $(SUITE)) $(ARGS)

install: build/wheel
	$(BUILDER)/bin/python -m package.install --wheel build/wheel/*.whl --prefix $(PREFIX) $(if $(DESTDIR),--destdir $(DESTDIR))

sbom: $(STAMPS)/builder
	@mkdir -p $(DIST)
	$(BUILDER)/bin/python -m package.sbom >$(DIST)/migrated.cdx.json

lock: $(STAMPS)/builder
	@[[ -x build/uv/bin/uv ]] || { python3 -m venv build/uv && build/uv/bin/pip install --quiet --disable-pip-version-check uv; }
	$(BUILDER)/bin/python -m package.lock build/uv/bin/uv
	$(BUILDER)/bin/python -m package.sbom --licences >docs/licences.md

# The Debian package on both releases, with more checkers than `make test` needs; and the Dockerfile.
PACKAGE_TEST_PACKAGES := lintian:lintian mandoc:mandoc man-db:man zsh:zsh fish:fish

test-packages: $(STAMPS)/installed $(STAMPS)/test-deps
	@.ci/deps $(PACKAGE_TEST_PACKAGES)
	@for suite in bookworm trixie; do \
		echo "Debian package for $$suite"; \
		MIGRATED_TEST_SUITE=$$suite $(BIN)/python -m pytest $(PYTEST_ARGS) tests/systemd/test_package.py tests/packages/test_deb.py; \
	done
	MIGRATED_TEST_IMAGE=1 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/packages --ignore=tests/packages/test_deb.py

clean:
	rm -rf build $(VENV)
