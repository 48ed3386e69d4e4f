#!/usr/bin/env bash
# Builds what benches/gpu/run.sh runs into target/gpu, so that a machine with a GPU needs neither Rust nor nvcc: the command, the engine's
# benchmark, and the node's unit tests. The kernels are for TIDEGATE_CUDA_ARCHS (90 unless it says otherwise).
set -euo pipefail
cd "$(dirname "$0")/../.."

CUDA_HOME="$(deploy/cuda.sh)"
export CUDA_HOME TIDEGATE_CUDA_ARCHS="${TIDEGATE_CUDA_ARCHS:-90}"
mkdir -p target/gpu

# built NAME WORDS...: copies the program that cargo builds by these words
built() {
    local name="$1" program
    shift
    program="$(cargo "$@" --locked --features cuda --message-format json |
        python3 -c 'import json, sys; print([m["executable"] for m in map(json.loads, sys.stdin) if m.get("executable")][-1])')"
    strip -o "target/gpu/$name" "$program"
}

built tidegate build --release
built engine bench --no-run --bench engine
built node-tests test --no-run --release -p tidegate-node --lib
ls -lh target/gpu
