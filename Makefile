# Two commands matter: `make demo` (the main job) and `make test` (every check).

LLVM := /usr/lib/llvm-22
PACKAGES := build-essential cmake llvm-22-dev libmlir-22-dev mlir-22-tools libclang-22-dev clang-22 \
            libpolly-22-dev libzstd-dev zlib1g-dev libxml2-dev libz3-dev openmpi-bin

.PHONY: demo test setup bench fmt

demo: setup ## plan, compile and train a small decoder on 8 virtual devices
	cargo build
	target/debug/meshweave run examples/demo.weave --report out/demo/report.html

test: setup ## format, lints and all tests
	@sh scripts/ptxas.sh target/tools
	@sh scripts/nvrtc.sh target/tools
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo check --no-default-features
	cargo test --workspace

bench: setup ## benchmarks (see benches/)
	cargo bench

setup: ## installs what is missing: Rust, LLVM/MLIR 22, cmake, an MPI (Debian packages)
	@sh scripts/setup.sh "$(LLVM)" $(PACKAGES)
