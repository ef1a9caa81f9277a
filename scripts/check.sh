#!/usr/bin/env bash
# Everything that can be checked without running the program: format, lint, types, image, scripts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly BIN=".venv/bin"

"$BIN/ruff" format --check .
"$BIN/ruff" check .
"$BIN/mypy"
"$BIN/mypy" tests
"$BIN/hadolint" Dockerfile
"$BIN/shellcheck" scripts/*.sh .ci/run
