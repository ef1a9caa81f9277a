#!/usr/bin/env bash
# Makes .venv, the only place this project installs anything into.
#   scripts/setup.sh runtime    what serving needs
#   scripts/setup.sh dev        the same, and what the tests need
# Says nothing and does nothing when .venv is already what pyproject.toml asks for.
#   PYTHON          the interpreter to build .venv from (default: the first of 3.11 or newer)
#   MOESTRO_TORCH   the torch to install, as pip spells it (default below; "torch" is the newest)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The release that the tests run on. A default of this script, not of the package: whoever
# installs the wheel keeps the torch they have.
readonly TORCH="${MOESTRO_TORCH:-torch==2.13.0}"
readonly VENV=".venv"
readonly LIBRARY="engine/kernels/_native.so"
readonly NEW_ENOUGH='import sys; sys.exit(sys.version_info < (3, 11))'

fail() {
    echo "moestro: $*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14}; do
        if "$candidate" -c "$NEW_ENOUGH" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    local found
    found="$("${PYTHON:-python3}" --version 2>/dev/null || echo "no ${PYTHON:-python3}")"
    fail "needs Python 3.11 or newer, found $found." \
        "Name one with: make setup PYTHON=/path/to/python3"
}

# The C compiler that builds the library of the products, as setuptools chooses it.
compiler() {
    local named="${CC:-}"
    [[ -n "$named" ]] || named="$("$VENV/bin/python" -c \
        "import sysconfig; print(sysconfig.get_config_var('CC') or 'cc')")"
    echo "${named%% *}"
}

# What .venv was built from. The folder is part of it: an environment does not survive a move.
fingerprint() {
    local cc
    cat pyproject.toml setup.py engine/kernels/src/* scripts/setup.sh
    echo "$1 $TORCH $PWD"
    "$VENV/bin/python" --version
    cc="$(compiler)"
    "$cc" --version 2>/dev/null || echo "no $cc"
}

up_to_date() {
    local kind="$1" stamp="$VENV/.$1.stamp"
    [[ -x "$VENV/bin/python" && -f "$stamp" ]] &&
        [[ "$(fingerprint "$kind" | cksum)" == "$(<"$stamp")" ]]
}

make_venv() {
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 && return
    local python
    python="$(find_python)"
    echo "moestro: making $VENV with $("$python" --version)"
    "$python" -m venv --clear "$VENV" ||
        fail "$python cannot make environments (on Debian: apt-get install python3-venv)"
}

install_packages() {
    local kind="$1" target="." quiet=()
    [[ "$kind" == dev ]] && target=".[dev]"
    [[ -t 1 ]] || quiet=(--quiet)
    echo "moestro: installing the $kind packages (the first time takes minutes: $TORCH is large)"
    "$VENV/bin/python" -m pip install --disable-pip-version-check "${quiet[@]+"${quiet[@]}"}" \
        "$TORCH" --editable "$target" ||
        fail "the packages could not be installed; the lines above say which and why"
}

# pip is silent about a build that did without.
check_library() {
    local cc why
    [[ ! -f "$LIBRARY" ]] || return 0
    cc="$(compiler)"
    why="there is no C compiler ($cc)"
    ! command -v "$cc" >/dev/null || why="the C compiler ($cc) failed"
    echo "moestro: $why, so torch's products serve, which decode at a fraction of the speed;" \
        "install one (on Debian: apt-get install gcc libc6-dev) and say make setup again" >&2
}

main() {
    local kind="${1:-}"
    [[ "$kind" == runtime || "$kind" == dev ]] || fail "usage: scripts/setup.sh runtime|dev"
    # An environment for the tests can also serve.
    if up_to_date "$kind" || { [[ "$kind" == runtime ]] && up_to_date dev; }; then
        return
    fi
    make_venv
    rm -f "$VENV/.runtime.stamp" "$VENV/.dev.stamp"
    install_packages "$kind"
    check_library
    fingerprint "$kind" | cksum >"$VENV/.$kind.stamp"
}

main "$@"
