#!/bin/sh
# Fetches NVIDIA's compiler of CUDA C++, which needs no GPU, for the tests: nvrtc.sh DIRECTORY
# Without it (no pip, no network) the tests of kernels in CUDA C++ say that they were skipped.
set -eu

directory=$1
version=12.9.86
# A folder of its own: pip does not add to packages that are there already.
folder=$directory/nvrtc

[ ! -e "$folder/nvidia/cuda_nvrtc/lib/libnvrtc.so.12" ] || exit 0
if ! python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
    --no-deps --target "$folder" "nvidia-cuda-nvrtc-cu12==$version"; then
    echo "nvrtc: not available; the tests of kernels in CUDA C++ will be skipped" >&2
fi
