#!/bin/sh
# Installs what the build needs and is missing: setup.sh LLVM_PREFIX PACKAGE...
# Says what to do, and stops, where it lacks the rights.
set -eu

llvm=$1
shift

if ! command -v cargo >/dev/null 2>&1; then
    echo "setup: Rust is missing; install Rust 1.95 or later from https://rustup.rs and run this again" >&2
    exit 1
fi

missing=
for package in "$@"; do
    status=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$status" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null 2>&1; then
    echo "setup: this system has no apt-get; install LLVM and MLIR 22 with headers under $llvm," >&2
    echo "setup: and the equivalents of:$missing" >&2
    exit 1
fi
if [ "$(id -u)" -eq 0 ]; then
    as_root=
elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
    as_root=sudo
else
    echo "setup: these packages are missing, and installing them needs root:" >&2
    echo "setup:   sudo apt-get update && sudo apt-get install --no-install-recommends$missing" >&2
    exit 1
fi

echo "setup: installing$missing"
$as_root apt-get update -qq
if ! $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null; then
    echo "setup: apt-get could not install$missing" >&2
    echo "setup: LLVM 22 for Debian and Ubuntu is also published at https://apt.llvm.org" >&2
    exit 1
fi
