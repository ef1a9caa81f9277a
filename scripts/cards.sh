#!/usr/bin/env bash
# Which share of published models' experts a card would hold: the table deploy/CARDS.md.
#   scripts/cards.sh            prints it, in some minutes; no GPU is needed
#   scripts/cards.sh --write    writes it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHONPATH="tests/bench:tests/support${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1 \
    exec "${PYTHON:-.venv/bin/python}" -m cards "$@"
