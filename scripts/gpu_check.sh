#!/usr/bin/env bash
# What needs an NVIDIA GPU: `moestro gpu-check`, then the tests marked `gpu`.
#   scripts/gpu_check.sh [REPORT [FLAG…]]   REPORT is gpu-check.json; flags are gpu-check's (--quick)
# Exit status: 0 where all passed, 1 where something failed, 2 where there is no GPU and nothing was
# run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
report="${1:-gpu-check.json}"
shift || true

status=0
.venv/bin/moestro gpu-check --out "$report" "$@" || status=$?
((status <= 1)) || exit "$status"
.venv/bin/pytest -m gpu || status=1
exit "$status"
