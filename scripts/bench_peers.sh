#!/usr/bin/env bash
# Installs what `make bench-full` measures beside moestro, each into a place of its own:
#   scripts/bench_peers.sh FOLDER [llama.cpp|xllamacpp|fastllm|stock …]     (default: all of them)
# FOLDER grows by about 3 GB. What cannot be had here is named, and the rest goes on; the
# benchmark then says which peer is missing. Nothing is done twice.
#   PYTHON          the interpreter for the environments (default: .venv's)
#   MOESTRO_TORCH   the torch of the environments, as pip spells it
#   JOBS            compilers at once (default: 2); more of them are faster and disturb others more
#   LLAMA_CMAKE     more of cmake's arguments for llama.cpp. Where its AMX products die of an illegal
#                   instruction (prefill; seen in a virtual machine), the same without AMX:
#                   "-DGGML_NATIVE=OFF -DGGML_SSE42=ON -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_BMI2=ON
#                    -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON
#                    -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly TORCH="${MOESTRO_TORCH:-torch==2.13.0}"
readonly LLAMA="llama-cpp-python==0.3.36" # its source archive holds llama.cpp
readonly XLLAMACPP="xllamacpp==2026.10.11549"
readonly FASTLLM="ftllm==1.9.0"
readonly STOCK=("transformers==5.23.0" "accelerate==1.15.0")
readonly JOBS="${JOBS:-2}"
readonly BASE_PYTHON="${PYTHON:-.venv/bin/python}"
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { echo "peers: $*"; }

environment() {
    local place="$1"
    [[ -x "$place/bin/python" ]] || "$BASE_PYTHON" -m venv "$place"
}

# The wheel of a CUDA build would bring gigabytes that nothing here could use.
install() {
    local place="$1"
    shift
    environment "$place"
    nice -n 15 "$place/bin/python" -m pip install --quiet "$@"
}

xllamacpp() {
    install "$1/xllamacpp" "$XLLAMACPP"
    "$1/xllamacpp/bin/python" -c "import xllamacpp"
}

# Its own list of needs is longer than what running a model takes.
fastllm() {
    install "$1/fastllm" --no-deps "$FASTLLM"
    install "$1/fastllm" "$TORCH" "${STOCK[0]}" numpy jinja2 fastapi uvicorn pydantic openai \
        shortuuid pillow
    "$1/fastllm/bin/python" -c "import ftllm.llm"
}

stock() {
    install "$1/stock" "$TORCH" "${STOCK[@]}"
    "$1/stock/bin/python" -c "import accelerate, transformers"
}

# Built for this machine's own processor, as a user who wants speed would.
llama.cpp() {
    local place="$1" sources more
    read -r -d '' -a more <<<"${LLAMA_CMAKE:-}" || true
    if [[ ! -x "$place/build/bin/llama-bench" ]]; then
        mkdir -p "$place/src"
        [[ -n "$(compgen -G "$place/src/llama_cpp_python-*.tar.gz")" ]] ||
            "$BASE_PYTHON" -m pip download --quiet --no-deps --no-binary llama-cpp-python \
                --dest "$place/src" "$LLAMA"
        tar -xzf "$place"/src/llama_cpp_python-*.tar.gz -C "$place/src"
        sources="$(echo "$place"/src/llama_cpp_python-*/vendor/llama.cpp)"
        environment "$place/cmake"
        command -v cmake >/dev/null || install "$place/cmake" cmake
        PATH="$PATH:$place/cmake/bin"
        cmake -S "$sources" -B "$place/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
            -DGGML_CUDA=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF \
            -DLLAMA_BUILD_EXAMPLES=OFF -DBUILD_SHARED_LIBS=OFF "${more[@]}"
        nice -n 15 cmake --build "$place/build" -j "$JOBS" \
            --target llama-bench llama-quantize llama-completion
    fi
    "$place/build/bin/llama-bench" --version
}

main() {
    [[ $# -ge 1 ]] || {
        echo "usage: scripts/bench_peers.sh FOLDER [llama.cpp|xllamacpp|fastllm|stock ...]" >&2
        exit 2
    }
    local folder peer missing=()
    mkdir -p "$1"
    folder="$(cd "$1" && pwd)"
    shift
    [[ $# -gt 0 ]] || set -- llama.cpp xllamacpp fastllm stock
    for peer in "$@"; do
        say "$peer: into $folder (minutes the first time)"
        # A shell of its own: inside an `if`, `set -e` would not end the one that fails.
        if scripts/bench_peers.sh --one "$folder" "$peer"; then
            say "$peer: ready"
        else
            say "$peer: not to be had here, the lines above say why; its comparisons are left out"
            missing+=("$peer")
        fi
    done
    [[ ${#missing[@]} == 0 ]] || say "missing: ${missing[*]}"
}

if [[ "${1:-}" == --one ]]; then
    "$3" "$2"
else
    main "$@"
fi
