# What people type. Each target installs the Debian packages that it lacks (as root, else it
# says what to install), builds what it needs, and says what it does.

SHELL := /bin/bash
SUITE ?=
BIN := target/x86_64-unknown-linux-gnu/release
STEP := packaging/step

.DEFAULT_GOAL := help
.PHONY: help build guest demo test bench soak lint

help: ## this list
	@echo "Spore: OCI containers in microVMs under stock containerd"
	@echo
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16
	@echo
	@echo "README.md has the rest."

build: ## compile everything
	@$(STEP) "Debian packages" packaging/need build
	@$(STEP) "Build" cargo build --release --locked --workspace --bins

guest: build ## make the guest's kernel and initramfs in target/guest
	@$(STEP) "Debian packages for the guest image" packaging/need guest
	@$(STEP) "Guest image" packaging/guest-image/build

demo: guest ## see containers run in microVMs; touches nothing of the machine's own containerd
	@$(STEP) "Debian packages for the test bed" packaging/need ground
	@$(STEP) "Demo" $(BIN)/spore-testbed demo

test: ## run every test, or one suite: make test SUITE=unit|fuzz|native|e2e|conformance
	@packaging/check $(SUITE)

# Of the VMM alone, with bare-metal guests on this machine's /dev/kvm.
NATIVE := datapath snapshot density
# These start applications: the ground gets an image of them, which is made once.
APPLICATIONS := $(if $(filter template,$(SUITE)),--applications)

ifneq ($(filter $(NATIVE),$(SUITE)),)
bench: build
	@mkdir -p target/bench
	@$(STEP) "Bench" env SPORE_RESULTS=target/bench $(BIN)/spore-bench $(SUITE)
	@echo "results: target/bench/$(SUITE).json"
else
bench: guest ## measure against runc, into target/bench: make bench [SUITE=coldstart]
	@$(STEP) "Debian packages for the test bed" packaging/need ground
	@mkdir -p target/bench
	@$(STEP) "Bench" $(BIN)/spore-testbed run --deadline 3600 $(APPLICATIONS) spore-bench $(SUITE)
	@cp target/testbed/spore-bench/*.json target/bench/
	@echo "results: $$(ls target/bench/*.json | tr '\n' ' ')"
endif

soak: guest ## the long counts, with reports in tests: make soak [SUITE=e2e|conformance]
	@$(STEP) "Debian packages for the test bed" packaging/need ground
	@$(STEP) "Soak" packaging/soak $(SUITE)

lint: ## formatting, clippy, shell scripts
	@$(STEP) "Debian packages for linting" packaging/need build lint
	@$(STEP) "Formatting" cargo fmt --all --check
	@$(STEP) "Clippy" cargo clippy --release --locked --workspace --all-targets -- -D warnings
	@$(STEP) "Shell scripts" bash -c "grep -rlE '^#!.*(ba)?sh' packaging .ci | xargs shellcheck"
