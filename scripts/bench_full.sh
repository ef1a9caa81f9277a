#!/usr/bin/env bash
# The whole benchmark, moestro beside its peers: scripts/bench_full.sh [p1 p5 …] [--turns 3] [--keep]
# Installs the peers first, each into a place of its own. Needs about 67 GB of free disk and hours;
# models are made, measured and removed again. See --help.
#   MOESTRO_BENCH_DIR     where models and packs go   (default: bench in the cache folder)
#   MOESTRO_BENCH_PEERS   where peers are installed   (default: bench-peers in the cache folder)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cache="${MOESTRO_CACHE_DIR:-$HOME/.cache/moestro}"
peers="${MOESTRO_BENCH_PEERS:-$cache/bench-peers}"
case " $* " in
*" --help "* | *" -h "*) ;;
*) scripts/bench_peers.sh "$peers" ;;
esac
PYTHONPATH="tests/bench:tests/support${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1 \
    exec .venv/bin/python -m full --peers "$peers" "$@"
