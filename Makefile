# One word for each thing done often. `make help` lists them.

# More for `tidegate up` or `bench-cpu`, such as: make up ARGS="--nodes 3", make bench-cpu ARGS="--only engine"
ARGS ?=

# How often `make bench-cpu` alternates ours and theirs, and `make bench-relay` its settings.
ROUNDS ?= 5

# How long `make fuzz` gives to each target.
SECONDS_EACH ?= 60

.PHONY: help up setup setup-test build cuda-build model test test-faults bench bench-cpu bench-edge bench-relay fuzz lint fmt doc deny ci

help: ## list these words
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

up: setup build ## install what is missing, build, fetch the model, run a balancer and two nodes on this machine
	@exec target/release/tidegate up $(ARGS)

setup: ## install what the build needs and this machine lacks
	@deploy/setup.sh build

setup-test: ## the same for the tests
	@deploy/setup.sh test

build: ## build target/release/tidegate
	cargo build --release --locked

cuda-build: setup ## build target/release/tidegate with CUDA; fetches nvcc where there is none
	CUDA_HOME="$$(deploy/cuda.sh)" cargo build --release --locked --features cuda

model: setup ## fetch the model that tests use
	cargo build --locked
	target/debug/tidegate model pull smollm2-135m

test: setup-test model ## run every test; the first time, fetch what they need
	cargo test --locked --workspace --doc
	cargo nextest run --locked --workspace

test-faults: setup-test model ## lose nodes, wires, etcd and a host under load, over and over, and compare every answer
	TIDEGATE_TEST_FAULTS=full cargo nextest run --locked --workspace --test cluster --profile faults -E 'test(/^(faults|hosts)::/)'

miri: setup ## run the plain forms of the kernels under Miri; needs: rustup toolchain install nightly --component miri,rust-src
	CARGO_TARGET_DIR=target/miri MIRIFLAGS=-Zmiri-disable-isolation PROPTEST_CASES=4 \
	    cargo +nightly miri test --locked -p tidegate-node --lib -- kernels::cpu

bench: setup ## measure the engine alone
	cargo bench --locked --workspace

bench-cpu: setup build ## measure beside llama.cpp on this machine's CPU, ROUNDS=5; the first time it fetches and builds llama.cpp
	@python3 benches/compare/cpu.py --rounds $(ROUNDS) $(ARGS)

bench-relay: setup build ## measure what it costs the balancer that streams can go on elsewhere, ROUNDS=5 of two times two minutes
	@python3 benches/compare/relay.py --rounds $(ROUNDS) $(ARGS)

bench-edge: setup build ## measure what a request and an event cost the balancer beside other proxies, ROUNDS=5
	@python3 benches/compare/edge.py --rounds $(ROUNDS) $(ARGS)

fuzz: setup ## give random input to every parser, SECONDS_EACH=60 each; stops at the first finding
	@cargo fuzz --version >/dev/null 2>&1 || { echo "cargo-fuzz is missing: cargo install cargo-fuzz --locked"; exit 69; }
	cp Cargo.lock fuzz/Cargo.lock
	@for target in $$(cargo fuzz list); do \
	    mkdir -p fuzz/corpus/$$target; \
	    cargo fuzz run --sanitizer none $$target fuzz/corpus/$$target fuzz/seeds/$$target -- \
	        -max_total_time=$(SECONDS_EACH) -timeout=10 -rss_limit_mb=2048 -malloc_limit_mb=1024 || exit 1; \
	done

lint: setup ## format, clippy, documentation, dependencies; warnings are errors
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- --deny warnings
	RUSTDOCFLAGS="--deny warnings" cargo doc --locked --workspace --no-deps --document-private-items
	@$(MAKE) --no-print-directory deny

deny:
	@if cargo deny --version >/dev/null 2>&1; then cargo deny check bans licenses sources; \
	else echo "cargo-deny is not installed, so licences and advisories go unchecked (cargo install cargo-deny --locked)"; fi

fmt: ## format
	cargo fmt --all

doc: ## build the documentation of all crates, private items too
	cargo doc --locked --workspace --no-deps --document-private-items

ci: test lint ## what .ci/run does
