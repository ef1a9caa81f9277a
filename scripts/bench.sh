#!/usr/bin/env bash
# Runs the benchmarks of tests/bench, or those named: scripts/bench.sh bench_engine …
# The last line each one prints is a JSON object.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
shopt -s nullglob

benches=()
for name in "$@"; do
    benches+=("tests/bench/${name%.py}.py")
done
[[ $# -gt 0 ]] || benches=(tests/bench/bench_*.py)
if [[ ${#benches[@]} == 0 ]]; then
    echo "bench: tests/bench holds no bench_*.py yet" >&2
    exit 1
fi
for bench in "${benches[@]}"; do
    echo "== $bench"
    .venv/bin/python "$bench"
done
