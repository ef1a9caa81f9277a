#!/usr/bin/env bash
# Runs what needs an NVIDIA GPU: the tests marked `gpu`, the engine's speed and the link's.
#   scripts/gpu_check.sh [REPORT]      one JSON object, written to REPORT (gpu-report.json)
# Exit status: 0 where all tests passed, 1 where one failed (the report says which), 3 where there is
# no CUDA device and nothing was run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec .venv/bin/python tests/bench/gpu_report.py "${1:-gpu-report.json}"
