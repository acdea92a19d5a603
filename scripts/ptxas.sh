#!/bin/sh
# Fetches NVIDIA's assembler of PTX, which needs no GPU, for the tests: ptxas.sh DIRECTORY
# Without it (no pip, no network) the tests that assemble PTX say that they were skipped.
set -eu

directory=$1
version=12.9.86
ptxas=$directory/nvidia/cuda_nvcc/bin/ptxas

[ ! -x "$ptxas" ] || exit 0
if ! python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
    --no-deps --target "$directory" "nvidia-cuda-nvcc-cu12==$version"; then
    echo "ptxas: not available; the tests that assemble PTX will be skipped" >&2
fi
