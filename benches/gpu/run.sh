#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: checks every kernel and whole models against the reference, then measures the engine on random weights
# of known shapes. Prints a table and writes JSON beside it. Build first, here or elsewhere: benches/gpu/build.sh
#
#   benches/gpu/run.sh [OUT]        OUT: a folder for the results, target/gpu/results unless given
set -euo pipefail
cd "$(dirname "$0")/../.."

out="${1:-target/gpu/results}"
mkdir -p "$out"
for program in node-tests engine tidegate; do
    [ -x "target/gpu/$program" ] || { echo "target/gpu/$program is missing: run benches/gpu/build.sh" >&2; exit 69; }
done
TIDEGATE_DATA_DIR="${TIDEGATE_DATA_DIR:-$(mktemp -d)}"
export TIDEGATE_DATA_DIR

# cuBLAS, where it came with Python packages alone
for folder in $(python3 -c 'import glob, site; print(*[d for s in site.getsitepackages() for d in glob.glob(s + "/nvidia/*/lib")])' 2>/dev/null); do
    LD_LIBRARY_PATH="$folder:${LD_LIBRARY_PATH:-}"
done
export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}"

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/gpu.txt"

echo "== checks"
target/gpu/node-tests --ignored on_a_gpu 2>&1 | tee "$out/checks.txt"

# measure SHAPE PREFILL DECODE
measure() {
    echo "== $1, bf16"
    target/gpu/tidegate model pull "random:$1" >/dev/null
    target/gpu/engine --gpu 0 --model "random:$1" --prefill "$2" --decode "$3" --json >"$out/$1.json"
    python3 benches/gpu/table.py "$out/$1.json"
}
measure qwen3-0.6b 512,2048 1,8,32,64,128,256
measure llama-3.2-1b 512,2048 1,8,32,64,128,256
measure llama-3.1-8b 512,2048,8192 1,8,32,64,128,256
