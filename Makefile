# Everything a person or CI does with this tree. `make` alone lists it.

PREFIX ?= /usr
DESTDIR ?=
SYSCONFDIR ?= /etc
SUITE ?= trixie
SUITES ?= trixie

BINDIR := $(PREFIX)/bin
LIBEXECDIR := $(PREFIX)/libexec
SIMDIR := $(PREFIX)/lib/mig-hook-sim
DATADIR := $(PREFIX)/share
MANDIR := $(DATADIR)/man
HOOKSDIR := $(DATADIR)/mig-hook/hooks.d/podman
CRIODIR := $(DATADIR)/mig-hook/hooks.d/crio
SCHEMADIR := $(DATADIR)/mig-hook/schema
SLURMDIR := $(LIBEXECDIR)/mig-hook/slurm
GRAFANADIR := $(DATADIR)/mig-hook/grafana
HPCDIR := $(DATADIR)/mig-hook/hpc
BASHDIR := $(DATADIR)/bash-completion/completions
ZSHDIR := $(DATADIR)/zsh/site-functions
FISHDIR := $(DATADIR)/fish/vendor_completions.d

CARGO ?= cargo
RUSTC ?= rustc
DIST := target/dist
# What --version tells: the last commit that changed what is built. Another commit builds nothing anew.
BUILT_FROM := build.rs Cargo.toml Cargo.lock src sim/build.rs sim/boards.json sim/Cargo.toml sim/src
COMMIT = $(shell git log -1 --abbrev=12 --format=%h -- $(BUILT_FROM) 2>/dev/null)$(if \
    $(shell git status --porcelain -- $(BUILT_FROM) 2>/dev/null),-changed)
# cargo from rustup, runc and dockerd: not in everybody's PATH.
export PATH := $(PATH):$(HOME)/.cargo/bin:/usr/sbin:/sbin

.PHONY: help deps build demo picture test test-docs test-engines test-slurm test-slurm-slow test-packages test-attack test-crash soak \
    check audit conformance fuzz bench bench-placement bench-queue install install-sim uninstall listing deb rpm licences sbom clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

deps: ## install what building and testing need and this machine lacks (Debian, Ubuntu; root)
	@scripts/install-deps

build: export MIG_HOOK_COMMIT = $(COMMIT)
build: ## build as shipped, with the simulator, into target/dist
	$(CARGO) build --release --locked --workspace --lib --bin mig-engine --bin migctl --bin nvml-sim
	host=$$($(RUSTC) -vV | sed -n 's/^host: //p') && \
	RUSTFLAGS='-C target-feature=+crt-static -C relocation-model=pie' $(CARGO) build --release --locked \
	    --no-default-features --bin mig-hook --bin mig-runtime --target "$$host" --target-dir target/first-stage && \
	RUSTFLAGS='-C target-feature=+crt-static -C relocation-model=pie' $(CARGO) build --release --locked \
	    --package mig-hook-sim --bin nvml-sim-smi --target "$$host" --target-dir target/first-stage && \
	mkdir -p $(DIST) && \
	cd target && install -m 755 "first-stage/$$host/release/mig-hook" "first-stage/$$host/release/mig-runtime" \
	    "first-stage/$$host/release/nvml-sim-smi" release/mig-engine release/migctl release/nvml-sim \
	    release/libnvidia_ml.so dist/

demo: ## real containers on a simulated machine, step by step (root; installs what is missing, touches nothing else)
	@scripts/demo

picture: build ## record docs/session.svg anew: a session with real containers on a simulated machine (root)
	@scripts/picture

test: deps build ## everything: unit tests, binaries on the simulator, real runc, podman and docker containers
	@scripts/test

test-engines: build ## the real-container tests against SUITE's engines, on cgroup v1 and v2 (root; SUITE=trixie, sid, ...)
	@scripts/test-engines $(SUITE)

test-slurm: build ## clusters of real Slurm on this machine, a node with simulated GPUs each (root; installs Slurm)
	@scripts/test-slurm

test-slurm-slow: build ## the same, and what waits for Slurm's slow clocks: many minutes
	@SLOW=1 scripts/test-slurm

test-packages: build ## the packages, on booted Debian of SUITES: install, upgrade, removal, purge (root; installs lintian, rpm, ...)
	@scripts/test-packages $(SUITES)

test-attack: build ## the attacks that docs/security.md names, on real containers with canaries on the host (root; part of test)
	@scripts/test-attack

test-crash: build ## kill -9 at every step of every operation, by every way in, and state that can't be written (a quarter of an hour; root); NAMES='job cdi' for some
	@scripts/test-crash $(NAMES)

soak: build ## TIME seconds of load (600) by every engine, with kills, gc and a rival tool, before an independent checker (root; SEED=N)
	@scripts/soak $(or $(TIME),600) $(SEED)

test-docs: build ## run what README.md, docs/*.md and sim/README.md show: every block of commands, every file (root)
	@scripts/test-docs

conformance: build ## clients that others wrote on the simulator, held against the scoreboard in sim/README.md (root; pip, cargo)
	@scripts/conformance

fuzz: ## every parser of what others write, by libFuzzer, TIME seconds each (10); TARGETS='plan config' for some (needs g++)
	@nice scripts/fuzz

check: ## formatting, clippy, documentation, shell scripts, licences and versions of the crates
	$(CARGO) fmt --all --check
	$(CARGO) fmt --manifest-path fuzz/Cargo.toml --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --workspace --no-deps
	shellcheck --external-sources scripts/demo scripts/dependencies scripts/engines.sh scripts/fuzz \
	    scripts/install-deps scripts/licences scripts/machine.sh \
	    scripts/package scripts/picture scripts/roots.sh scripts/sbom scripts/soak scripts/tally.sh scripts/test scripts/test-attack \
	    scripts/test-crash scripts/test-docs scripts/test-engines scripts/test-packages scripts/test-slurm .ci/run packaging/hpc/enroot/* packaging/hpc/lsf/*
	scripts/dependencies

audit: ## known vulnerabilities and withdrawn versions among the crates (needs RustSec's list; installs cargo-audit into target/tools)
	$(CARGO) install --quiet --locked --root target/tools cargo-audit@0.22.2
	for lock in Cargo.lock fuzz/Cargo.lock; do target/tools/bin/cargo-audit audit --deny yanked --file "$$lock" || exit 1; done

bench: build ## what a slice costs, beside a plain container
	@scripts/bench

bench-placement: ## how well and how fast slices are placed, held against expected decisions (ARGS='--trace FILE --json' replays a file)
	$(CARGO) bench --quiet --locked --package placement-bench -- --from '$(CURDIR)' $(ARGS)

bench-queue: ## what waiting in line costs and wins, held against the reference figures (no GPU, no root)
	$(CARGO) bench --quiet --locked --bench queue

install: ## into $(DESTDIR)$(PREFIX) and $(DESTDIR)$(SYSCONFDIR); after make build
	install -D -m 755 $(DIST)/migctl $(DESTDIR)$(BINDIR)/migctl
	install -D -m 755 $(DIST)/mig-runtime $(DESTDIR)$(BINDIR)/mig-runtime
	install -D -m 755 $(DIST)/mig-engine $(DESTDIR)$(LIBEXECDIR)/mig-hook/mig-engine
	install -D -m 755 $(DIST)/mig-hook $(DESTDIR)$(LIBEXECDIR)/oci/hooks.d/mig-hook
	install -D -m 644 -t $(DESTDIR)$(MANDIR)/man1 docs/man/*.1
	install -D -m 644 -t $(DESTDIR)$(MANDIR)/man5 docs/man/*.5
	install -D -m 644 -t $(DESTDIR)$(MANDIR)/man8 docs/man/*.8
	install -d -m 755 $(DESTDIR)$(HOOKSDIR) $(DESTDIR)$(CRIODIR)
	for hook in hooks/*.json.in hooks/crio/*.json.in; do \
	    case $$hook in hooks/crio/*) dir=$(CRIODIR) ;; *) dir=$(HOOKSDIR) ;; esac; \
	    target=$(DESTDIR)$$dir/$$(basename "$$hook" .in); \
	    sed 's|@LIBEXECDIR@|$(LIBEXECDIR)|' "$$hook" >"$$target" && chmod 644 "$$target" || exit 1; \
	done
	install -d -m 755 $(DESTDIR)$(SLURMDIR)
	for script in prolog task-prolog epilog; do \
	    target=$(DESTDIR)$(SLURMDIR)/$$script; \
	    sed 's|@BINDIR@|$(BINDIR)|' "packaging/slurm/$$script.in" >"$$target" && chmod 755 "$$target" || exit 1; \
	done
	for file in packaging/hpc/*/*; do \
	    target=$(DESTDIR)$(HPCDIR)/$${file#packaging/hpc/}; mode=644; test ! -x "$$file" || mode=755; \
	    install -D -m "$$mode" "$$file" "$$target" && \
	    sed -i 's|/usr/bin/migctl|$(BINDIR)/migctl|; s|/usr/libexec|$(LIBEXECDIR)|' "$$target" || exit 1; \
	done
	find packaging/dist/usr -type f | while read -r file; do \
	    target=$(DESTDIR)$(PREFIX)/$${file#packaging/dist/usr/}; \
	    install -d -m 755 "$${target%/*}" && sed 's|@BINDIR@|$(BINDIR)|' "$$file" >"$$target" && chmod 644 "$$target" || exit 1; \
	done
	find packaging/dist/etc -type f | while read -r file; do \
	    target=$(DESTDIR)$(SYSCONFDIR)/$${file#packaging/dist/etc/}; [ -e "$$target" ] || install -D -m 644 "$$file" "$$target" || exit 1; \
	done
	install -D -m 644 -t $(DESTDIR)$(SCHEMADIR) docs/schema/*
	install -D -m 644 -t $(DESTDIR)$(GRAFANADIR) packaging/grafana/mig-hook.json
	install -d -m 755 $(DESTDIR)$(BASHDIR) $(DESTDIR)$(ZSHDIR) $(DESTDIR)$(FISHDIR)
	$(DIST)/migctl completions bash >$(DESTDIR)$(BASHDIR)/migctl && chmod 644 $(DESTDIR)$(BASHDIR)/migctl
	$(DIST)/migctl completions zsh >$(DESTDIR)$(ZSHDIR)/_migctl && chmod 644 $(DESTDIR)$(ZSHDIR)/_migctl
	$(DIST)/migctl completions fish >$(DESTDIR)$(FISHDIR)/migctl.fish && chmod 644 $(DESTDIR)$(FISHDIR)/migctl.fish

install-sim: ## the simulator, likewise
	install -D -m 755 $(DIST)/nvml-sim $(DESTDIR)$(SIMDIR)/nvml-sim
	install -D -m 755 $(DIST)/nvml-sim-smi $(DESTDIR)$(SIMDIR)/nvml-sim-smi
	install -D -m 644 $(DIST)/libnvidia_ml.so $(DESTDIR)$(SIMDIR)/libnvidia_ml.so
	install -d -m 755 $(DESTDIR)$(BINDIR)
	ln -sfr $(DESTDIR)$(SIMDIR)/nvml-sim $(DESTDIR)$(BINDIR)/nvml-sim
	install -D -m 644 sim/nvml-sim.1 $(DESTDIR)$(MANDIR)/man1/nvml-sim.1

uninstall: ## take both away again; state, and settings that were changed, stay
	grep -v '^#' packaging/installed.txt | while read -r mode path; do \
	    case $$path in \
	        /etc/*) file=$(DESTDIR)$(SYSCONFDIR)$${path#/etc}; cmp -s "packaging/dist$$path" "$$file" || continue ;; \
	        *) file=$(DESTDIR)$(PREFIX)$${path#/usr} ;; \
	    esac; \
	    rm -f "$$file"; \
	done
	-find $(DESTDIR)$(LIBEXECDIR)/mig-hook $(DESTDIR)$(SIMDIR) $(DESTDIR)$(DATADIR)/mig-hook $(DESTDIR)$(SYSCONFDIR)/mig-hook \
	    -depth -type d -empty -delete 2>/dev/null

listing: ## what both put where, as packaging/installed.txt has it
	@rm -rf target/listing
	@for part in install install-sim; do \
	    $(MAKE) --no-print-directory --silent $$part DESTDIR=$(CURDIR)/target/listing/$$part PREFIX=/usr && echo "# make $$part" && \
	    (cd target/listing/$$part && find . ! -type d -printf '%m /%P\n' | LC_ALL=C sort -k 2) || exit 1; \
	done

deb: build ## Debian packages, with the simulator as one of its own, into target/packages (needs debhelper)
	@scripts/package deb

rpm: build ## the same as rpms (needs rpmbuild)
	@scripts/package rpm

licences: ## what is linked in, with notices and licences, into target/THIRD-PARTY.txt
	@mkdir -p target && scripts/licences >target/THIRD-PARTY.txt && echo target/THIRD-PARTY.txt

sbom: ## the same as CycloneDX documents, into target/sbom (installs cargo-cyclonedx into target/tools)
	@scripts/sbom

clean: ## remove what was built
	$(CARGO) clean
