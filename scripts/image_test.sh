#!/usr/bin/env bash
# Builds the image that computes on the CPU and uses it as its users do: not as root, the official
# client, SIGTERM. Then as much of the CUDA image as this machine's packages allow.
# Needs root and buildah (Debian: apt-get install buildah debootstrap); no container engine runs.
#   scripts/image_test.sh
#   BASE_IMAGE        the base to build on   (default: one made of Debian's packages, kept)
#   TORCH             as the Dockerfile's    (default: its own)
#   MOESTRO_IMAGE_DIR where the base and the images lie (default: image-test in the cache folder)
# Exits 3 where buildah is not here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly FOLDER="${MOESTRO_IMAGE_DIR:-${MOESTRO_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/moestro}/image-test}"
readonly PYTHON="${PYTHON:-.venv/bin/python}"
readonly SUITE=bookworm

if ! command -v buildah >/dev/null; then
    echo "image-test: buildah is not here (Debian: apt-get install buildah debootstrap)" >&2
    exit 3
fi
mkdir -p "$FOLDER"
# One storage of its own: removing the folder removes all of it.
buildah() {
    command buildah --root "$FOLDER/storage" --runroot "$FOLDER/run" --storage-driver vfs "$@"
}

base_image() {
    local base="localhost/moestro-base:$SUITE"
    if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
        echo "image-test: making a base of Debian's packages" >&2
        local root="$FOLDER/base" container
        rm -rf "$root"
        debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates \
            "$SUITE" "$root" >"$FOLDER/debootstrap.log" 2>&1 || {
            tail -n 5 "$FOLDER/debootstrap.log" >&2
            return 1
        }
        container="$(buildah from scratch)"
        buildah add --quiet "$container" "$root" / >/dev/null
        buildah commit --quiet --rm --format docker "$container" "$base" >/dev/null
        rm -rf "$root"
    fi
    echo "$base"
}

# What pip is told on this machine, for pip inside: its configuration, and the folders it names.
mounts=(--volume "$FOLDER/pip.conf:/etc/pip.conf:ro")
pip_settings() {
    "$PYTHON" -m pip config list | "$PYTHON" -c '
import ast, sys
found = dict(line.strip().split("=", 1) for line in sys.stdin if line.startswith("global."))
print("[global]")
for name, value in found.items():
    print(name.removeprefix("global."), "=", ast.literal_eval(value))
' >"$FOLDER/pip.conf"
    local path
    for path in $("$PYTHON" -m pip config list | grep -oE "(file://)?/[^' ]+" | sed 's|^file://||' | sort -u); do
        path="${path%/simple}" # an index's files lie beside it
        [[ ! -e "$path" ]] || mounts+=(--volume "$path:$path:ro")
    done
}

# Without layers: this storage would keep a whole copy for each step.
build() {
    local target="$1" torch=()
    shift
    [[ -z "${TORCH:-}" ]] || torch=(--build-arg "TORCH=$TORCH")
    buildah bud --quiet --isolation chroot --format docker --layers=false "${mounts[@]}" \
        --build-arg "BASE_IMAGE=$base" "${torch[@]}" --target "$target" "$@" .
}

base="${BASE_IMAGE:-$(base_image)}"
pip_settings
SECONDS=0
build cpu --tag moestro:cpu >/dev/null
echo "image-test: the CPU's image is built, $SECONDS s"
buildah inspect --type image moestro:cpu | "$PYTHON" -c '
import json, sys
config = json.load(sys.stdin)["Docker"]["config"]
assert config["User"] == "10001:10001", config["User"]
assert config["Entrypoint"] == ["moestro"], config["Entrypoint"]
assert "8000/tcp" in config["ExposedPorts"], config["ExposedPorts"]
assert config["Healthcheck"]["Test"][0] == "CMD", config["Healthcheck"]
'
container="$(buildah from --pull-never moestro:cpu)"
trap 'buildah rm "$container" >/dev/null' EXIT
root="$(buildah mount "$container")"
echo "image-test: $(du -sm "$root" | cut -f1) MB, of these $(du -sm "$root/opt/moestro" | cut -f1) in /opt/moestro"
PYTHONPATH="tests/support${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -c '
import sys
from pathlib import Path
import tiny
tiny.build("mixtral", Path(sys.argv[1]))
' "$FOLDER/model"
chmod -R a+rX "$FOLDER/model" # whoever the container's user is
if [[ ! -x "$FOLDER/client/bin/python" ]]; then
    "$PYTHON" -m venv "$FOLDER/client"
    "$FOLDER/client/bin/pip" install --quiet openai
fi
"$FOLDER/client/bin/python" tests/clients/programs/in_image.py buildah --root "$FOLDER/storage" \
    --runroot "$FOLDER/run" --storage-driver vfs run --isolation chroot \
    --volume "$FOLDER/model:/model:ro" "$container" --

if build build-cuda >"$FOLDER/cuda.log" 2>&1; then
    build cuda --tag moestro:cuda >/dev/null
    echo "image-test: the CUDA image is built, too"
else
    # Of what the steps before it print, torch's is the only reason that is none of ours.
    reason="$(grep -aE '^torch .* is built without CUDA' "$FOLDER/cuda.log" | tail -n 1)" || {
        tail -n 5 "$FOLDER/cuda.log" >&2
        exit 1
    }
    echo "image-test: the CUDA image, as far as the packages here allow: $reason"
fi
echo "image-test: passed in $SECONDS s"
