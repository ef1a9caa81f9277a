#!/usr/bin/env bash
# Splits, routers and recovery on the demo's dense model, in one table: tests/bench/study/STUDY.md.
# Finished cells are kept and not run again; Ctrl-C loses the running one alone.
#   scripts/study.sh                    what is missing, within two hours of one core
#   scripts/study.sh --list             what is finished, and how long the rest will take
#   scripts/study.sh --only recovered   cells by a part of their name
#   scripts/study.sh --quick            a sample in 8 minutes, which fails if it is odd
#   MOESTRO_STUDY_DIR   where texts and plans go   (default: study in the cache folder)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHONPATH="tests/bench:tests/support${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1 \
    exec "${PYTHON:-.venv/bin/python}" -m study "$@"
