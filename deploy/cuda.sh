#!/usr/bin/env bash
# Prints where nvcc's toolkit stands, for CUDA_HOME: an installed one, or else one that this fetches from PyPI into target/cuda (about
# 105 MB: the compiler and its headers, no libraries).
set -euo pipefail

if [ -n "${CUDA_HOME:-}" ] && [ -x "$CUDA_HOME/bin/nvcc" ]; then
    echo "$CUDA_HOME"
    exit
fi
if nvcc="$(type -P nvcc)"; then
    dirname "$(dirname "$(readlink -f "$nvcc")")"
    exit
fi

home="$PWD/target/cuda"
if [ ! -x "$home/bin/nvcc" ]; then
    echo "nvcc is missing: fetching it from PyPI into target/cuda" >&2
    work="$(mktemp -d)"
    trap 'rm -rf "$work"' EXIT
    python3 -m pip download --quiet --no-deps --only-binary=:all: --dest "$work/wheels" \
        nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 \
        nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 >&2
    for wheel in "$work"/wheels/*.whl; do
        python3 -m zipfile -e "$wheel" "$work/all"
    done
    # zip files of wheels carry no modes
    chmod +x "$work"/all/nvidia/cu13/bin/* "$work"/all/nvidia/cu13/nvvm/bin/cicc
    mkdir -p target
    rm -rf "$home"
    mv "$work/all/nvidia/cu13" "$home"
fi
echo "$home"
