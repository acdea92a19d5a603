#!/bin/sh
# Runs the programs of a folder on a GPU: gpu.sh FOLDER [--bench]
# The folder is what `make gpu-corpus` has made, here or on another machine.
set -eu

folder=$1
shift
checker=$folder/gpu_check
if [ ! -x "$checker" ] || [ ! -d "$folder/corpus" ]; then
    echo "$folder has no programs to run: make them with \`make gpu-corpus\`, here or on a machine with LLVM, and carry the folder" >&2
    exit 1
fi
case "${1-}" in
--bench) ;;
*)
    # Once with cuBLASLt's products, where it is installed, and once with generated kernels alone.
    "$checker" "$folder/corpus"
    exec "$checker" "$folder/corpus" --generated
    ;;
esac
"$checker" "$folder/timed" --bench
"$checker" "$folder/timed" --bench --generated

# The same steps and kernels by PyTorch and Triton, where they are installed.
if ! python3 -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "PyTorch is not installed with CUDA here: its steps and kernels are not timed"
    exit 0
fi
cd "$folder/baselines"
for size in small gpt2; do
    for dtype in f32 bf16; do
        python3 golden_torch.py --device cuda --size $size --dtype $dtype --steps 22 --compile
    done
done
for size in large attention-8k; do
    python3 golden_torch.py --device cuda --size $size --dtype bf16 --steps 22 --compile
    python3 kernels_torch.py --size $size
done
