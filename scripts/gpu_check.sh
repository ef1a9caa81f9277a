#!/usr/bin/env bash
# Runs the tests marked `gpu`. Fails where there is no CUDA device: nothing was checked there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

.venv/bin/python - <<'PYTHON' || exit 1
import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"gpu-check: torch {torch.__version__} sees no CUDA device; nothing was checked")
print(f"gpu-check: torch {torch.__version__} on {torch.cuda.get_device_name()}")
PYTHON

status=0
.venv/bin/pytest -m gpu "$@" || status=$?
if [[ "$status" == 5 ]]; then # pytest's word for "collected nothing"
    echo "gpu-check: no test is marked gpu yet; nothing was checked" >&2
fi
exit "$status"
