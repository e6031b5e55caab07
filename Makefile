# The two commands a newcomer needs are `make demo` and `make test`. Each installs what it misses
# from Debian's packages, says what it does, and works again the second time.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

# Build products and test tools live outside the checkout, so that a fresh clone starts warm. PATH
# stays as it is: the tools hold a second containerd, and tests look for both.
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/darter
export CARGO_TARGET_DIR ?= $(CACHE)/target
export DARTER_TOOLS ?= $(CACHE)/tools
export DARTER_NOT_RUN ?= $(CARGO_TARGET_DIR)/not-run.txt
TEST_LOG := $(CARGO_TARGET_DIR)/test.log
# Most tests wait: for links that have a rate, for timers, for other programs. Two for each processor; a cluster of
# containerds takes half a gigabyte of memory, so no more than 16.
TEST_THREADS := $(or $(RUST_TEST_THREADS),$(shell n=$$(nproc); echo $$((n > 8 ? 16 : 2 * n))))
export DARTER_REVISION ?= $(shell git rev-parse --short HEAD 2>/dev/null || echo unknown)

.PHONY: help needs-root demo test test-long check fuzz bench bench-mirror bench-swarm bench-sim bench-gpu bench-scaler test-gpu test-kube tools control-plane image build clean

help: ## Say what there is
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 24

# Before every cargo command that builds more than darter-core: it brings protoc.
tools: ## Install what builds and tests need, as far as it is missing
	@scripts/install-tools

# Apart from tools: it takes minutes, and only tests need it.
control-plane: ## Build kube-apiserver, etcd and helm, with which Kubernetes and the chart are tested
	@scripts/install-tools kubernetes

build: tools ## Build darter (release)
	cargo build --release --locked -p darter

image: build ## Make the image that the chart runs, an OCI archive of the release build (OUTPUT=darter.tar); needs root
	@scripts/install-tools image
	@scripts/make-image $(if $(OUTPUT),--output "$(OUTPUT)")

# Said before minutes of building, not after them.
needs-root:
	@[ "$$(id -u)" = 0 ] || { echo "make demo: needs root, to make network namespaces and mounts" >&2; exit 1; }

demo: needs-root build ## One node pulls through an agent; then four at once, a fifth late, one killed; then GPUs, and a scaler (SIZE=256, in MiB)
	cargo run --release --locked -p darter-tests --bin demo -- $(SIZE)

test: control-plane ## Every test, against real containerd and registries, and a real kube-apiserver
	@scripts/install-tools image
	@rm -f -- "$(DARTER_NOT_RUN)"
	@echo "== building the agent that the tests start"
	cargo build --locked -p darter
	@echo "== testing"
	RUST_TEST_THREADS=$(TEST_THREADS) cargo test --locked --workspace --no-fail-fast | tee "$(TEST_LOG)" || { scripts/test-summary "$(TEST_LOG)" FAILED; exit 1; }
	@scripts/test-summary "$(TEST_LOG)"

test-gpu: tools ## What this machine's own GPUs say against what the fixtures of the mock say (DARTER_NVML_PATH)
	cargo build --locked -p darter
	cargo run --locked -p darter-tests --bin test-gpu

# Apart from test: the tools are large, and each test waits for the timers of Karpenter and KEDA. One at a time: each
# has a whole cluster.
test-kube: ## The scaler's ground: a real scheduler, Karpenter with made-up instances, and KEDA's operator; needs root
	@scripts/install-tools kube
	cargo build --locked -p darter
	@rm -f -- "$(DARTER_NOT_RUN)"
	cargo test --locked -p darter-tests --test kube -- --ignored --test-threads=1 | tee "$(TEST_LOG)" || { scripts/test-summary "$(TEST_LOG)" FAILED; exit 1; }
	@scripts/test-summary "$(TEST_LOG)"

test-long: test ## The same with many more random cases
	PROPTEST_CASES=20000 cargo test --locked --release -p darter-core -p darter-agent -p darter-scaler
	DARTER_SIM_SEEDS=20000 cargo test --locked --release -p darter-tests --test sim

check: tools ## Formatting, lints, purity of the core, licences, and that fuzz targets compile
	cargo fmt --all --check
	cargo fmt --manifest-path fuzz/Cargo.toml --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	@# Nothing is linked, so there need not be a fuzzer.
	CUSTOM_LIBFUZZER_PATH=/nonexistent/libfuzzer.a cargo check --locked --manifest-path fuzz/Cargo.toml --bins
	@scripts/check-wasm
	@scripts/check-deny

fuzz: ## Run each fuzz target for a minute (FUZZ_SECONDS=60)
	@scripts/fuzz

bench: bench-mirror bench-swarm bench-sim bench-gpu bench-scaler ## Every benchmark, as ratios against a peer or bound measured in the same run

bench-mirror: build ## Local hits against nginx and hyper, cold pulls, memory, an agent that is down
	cargo run --release --locked -p darter-benches --bin mirror

bench-swarm: build ## Pieces between nodes against nginx; swarms against the bound (ROWS="cold4 tls" SIZE=64)
	cargo run --release --locked -p darter-benches --bin swarm -- $(ROWS) $(if $(SIZE),size=$(SIZE))

bench-sim: tools ## Swarms of up to 10,000 nodes, played: the last node against the bound (SIM_ROWS="cold64 warm64")
	cargo run --release --locked -p darter-benches --bin sim -- $(SIM_ROWS)

bench-gpu: build ## What it costs to watch GPUs, with a mock of eight
	cargo run --release --locked -p darter-benches --bin gpu

bench-scaler: build ## One decision of the scaler for 1,000 and 10,000 nodes; a scaler with 1,000 agents, and KEDA
	cargo run --release --locked -p darter-benches --bin decide
	cargo run --release --locked -p darter-benches --bin scaler

clean: ## Remove build products, test tools and images
	cargo clean
	rm -rf -- "$(DARTER_TOOLS)" "$(CACHE)/image"
