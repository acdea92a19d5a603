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
exec "$checker" "$folder/corpus" "$@"
