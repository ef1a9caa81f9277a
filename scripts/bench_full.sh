#!/usr/bin/env bash
# The whole benchmark, moestro beside its peers: scripts/bench_full.sh [p1 p5 …] [--turns 3] [--keep]
# Installs the peers first, each into a place of its own, where a bar asks for them. Models and
# packs are made, measured and removed again, one format at a time: --geometry olmoe8 (half the
# depth, where the bars are judged) needs 15 GB of free disk, the whole depth 30, and hours.
#   scripts/bench_full.sh p9 --windows 2 --formats int4/int4     a format's quality, in a minute
# See --help.
#   MOESTRO_BENCH_DIR     where models and packs go   (default: bench in the cache folder)
#   MOESTRO_BENCH_PEERS   where peers are installed   (default: bench-peers in the cache folder)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cache="${MOESTRO_CACHE_DIR:-$HOME/.cache/moestro}"
peers="${MOESTRO_BENCH_PEERS:-$cache/bench-peers}"

# No bar named is all of them.
asks_for_peers() {
    local word named=""
    for word in "$@"; do
        case "$word" in
        --help | -h) return 1 ;;
        p1 | p2 | p3) return 0 ;;
        p[0-9]*) named=1 ;;
        esac
    done
    [[ -z "$named" ]]
}

if asks_for_peers "$@"; then
    scripts/bench_peers.sh "$peers"
fi
PYTHONPATH="tests/bench:tests/support${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1 \
    exec "${PYTHON:-.venv/bin/python}" -m full --peers "$peers" "$@"
