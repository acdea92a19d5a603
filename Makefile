# Two commands matter: `make demo` (the main job) and `make test` (every check).

LLVM := /usr/lib/llvm-22
PACKAGES := build-essential cmake llvm-22-dev libmlir-22-dev mlir-22-tools libclang-22-dev clang-22 \
            libpolly-22-dev libzstd-dev zlib1g-dev libxml2-dev libz3-dev openmpi-bin

.PHONY: demo test setup bench fmt gpu-corpus test-gpu bench-gpu

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

# What a machine with a GPU needs: programs with what they must give, and their checker. Neither LLVM nor
# a network is needed there; carry the folder `target/gpu`.
GPU := target/gpu
GPU_TARGET ?= sm_90

gpu-corpus: setup ## compiles the programs that test-gpu and bench-gpu run, into target/gpu
	@sh scripts/nvrtc.sh target/tools
	cargo run -- corpus $(GPU)/corpus --target cuda:$(GPU_TARGET)
	cargo run -- corpus $(GPU)/timed --timed --target cuda:$(GPU_TARGET)
	cargo build -p meshweave-runtime --example gpu_check
	cp target/debug/examples/gpu_check $(GPU)/gpu_check
	cp -r benches/baselines $(GPU)/

test-gpu: ## runs the programs of target/gpu on a GPU, against the serial model and the CPU
	@sh scripts/gpu.sh $(GPU)

bench-gpu: ## times steps and kernels there, beside the device's limits and PyTorch's where it is installed
	@sh scripts/gpu.sh $(GPU) --bench

setup: ## installs what is missing: Rust, LLVM/MLIR 22, cmake, an MPI (Debian packages)
	@sh scripts/setup.sh "$(LLVM)" $(PACKAGES)
