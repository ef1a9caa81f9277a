"""The files of a model's folder: which hold its weights, opened and listed, each key once.

The choice is transformers' own, so that a stray file is never read: those of the index, else
model.safetensors, else the only one. Pickles are never opened.
"""

import hashlib
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from moestro.engine.facts import ModelNotFound, ModelRefused
from moestro.engine.gguf_files import GgufSource, gguf_paths

from .damage import few, one_line, read_json, readable, refuse_dangling, refuse_stand_in
from .padded_file import LENGTH_BYTES, MAX_HEADER_BYTES, padded_slices
from .routers import ROUTERS_NAME

log = logging.getLogger("moestro.engine")

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.safetensors")


def gguf_source(path: Path) -> GgufSource | None:
    """The GGUF model that `path` is, or has where it is a folder without other weights.

    Raises ModelNotFound or ModelRefused.
    """
    with readable(path):
        for each in gguf_paths(path) or ():
            refuse_stand_in(each)
        return GgufSource.of(path)


def weight_files(folder: Path) -> list[Path]:
    """At least one; of a GGUF its parts in order.

    Raises ModelNotFound, or ModelRefused for files that are here but not carried.

    Among the refused: shards that are missing, files of which none is known to be the model.
    """
    with readable(folder):
        parts = gguf_paths(folder)
        if parts is not None:
            return list(parts)
        names = sorted(entry.name for entry in folder.iterdir())
    found = [name for name in names if name.endswith(".safetensors") and name != ROUTERS_NAME]
    if INDEX_NAME in names:
        chosen = sorted(set(weight_map(folder).values()))
        _refuse_lost_shards(folder, chosen, found)
    elif SINGLE_NAME in found:
        chosen = [SINGLE_NAME]
    elif len(found) > 1:
        raise ModelRefused(
            f"{folder} has {few(found)} and no {INDEX_NAME} that says which belong together; add"
            " the index, or leave one file"
        )
    else:
        chosen = found
    if not chosen:
        _refuse_pickles(folder, names)
    for name in chosen:
        with readable(folder / name):
            refuse_dangling(folder / name)
    _log_unread(folder, sorted(set(found) - set(chosen)))
    return [folder / name for name in chosen]


def fingerprint(config: bytes, paths: Iterable[Path]) -> str:
    """Changes when the config does, or the name, size or time of a file."""
    digest = hashlib.sha256(config)
    for path in sorted(paths):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def _refuse_lost_shards(folder: Path, chosen: list[str], found: list[str]) -> None:
    lost = [name for name in chosen if name not in found]
    if lost:
        raise ModelRefused(
            f"{folder}: shard {few(lost)} is missing ({len(chosen) - len(lost)} of the"
            f" {len(chosen)} that {INDEX_NAME} names are here); fetch it again"
        )


def _log_unread(folder: Path, unread: list[str]) -> None:
    """One that is named like a shard is warned of: the index may be another model's."""
    shards = [name for name in unread if _SHARD.fullmatch(name)]
    others = [name for name in unread if name not in shards]
    if shards:
        log.warning(
            "%s: %s not read, because %s",
            folder,
            few(shards),
            f"{INDEX_NAME} does not name it"
            if (folder / INDEX_NAME).exists()
            else f"the model is in {SINGLE_NAME}",
        )
    if others:
        log.info("not read, because the model is in other files: %s", few(others))


def _refuse_pickles(folder: Path, names: list[str]) -> None:
    pickled = [name for name in names if Path(name).suffix in PICKLES]
    if pickled:
        raise ModelRefused(
            f"{folder} has only {few(pickled)}, which can run code when it is opened;"
            " use a version of the model with .safetensors files"
        )
    raise ModelNotFound(f"{folder} has no .safetensors files and no GGUF file")


def weight_map(folder: Path) -> dict[str, str]:
    """{tensor: file's name} of the index. Raises ModelRefused where it is none."""
    path = folder / INDEX_NAME
    index = read_json(path, "a weight index")
    try:
        found = index["weight_map"]
    except (LookupError, TypeError) as error:
        raise ModelRefused(f"{path} is not a weight index: it has no weight_map") from error
    if not isinstance(found, dict) or not found:
        raise ModelRefused(f"{path} is not a weight index: weight_map names no tensors")
    for name in found.values():
        if not isinstance(name, str) or name != Path(name).name or not name:
            raise ModelRefused(f"{path} is not a weight index: {name!r} is not a file's name")
    return found


def open_weights(paths: list[Path]) -> dict[str, tuple[Path, Any]]:
    """{key: (file, slice)} of all files. Raises ModelRefused, also where two have the same key."""
    found: dict[str, tuple[Path, Any]] = {}
    for path in paths:
        for key, part in _slices_of(path).items():
            if key in found:
                raise ModelRefused(
                    f"{path.parent}: tensor {key} is in {found[key][0].name} and in {path.name}"
                )
            found[key] = (path, part)
    if paths and (paths[0].parent / INDEX_NAME).is_file():
        _compare_index(paths[0].parent, {key: path.name for key, (path, _) in found.items()})
    return found


def _compare_index(folder: Path, name_of_key: dict[str, str]) -> None:
    """Stock transformers takes a tensor from whichever shard has it; so do we, not in silence."""
    said = weight_map(folder)
    lost = [f"{key} (of {name})" for key, name in said.items() if key not in name_of_key]
    if lost:
        raise ModelRefused(
            f"{folder / INDEX_NAME}: tensors of the index are missing in its files: {few(lost)};"
            " the index and the files are not of one model, fetch them again"
        )
    moved = [
        f"{key} ({name_of_key[key]}, not {name})"
        for key, name in said.items()
        if name_of_key[key] != name
    ]
    if moved:
        log.warning("%s is wrong about where tensors are: %s", folder / INDEX_NAME, few(moved))


def _slices_of(path: Path) -> dict[str, Any]:
    """Raises ModelNotFound or ModelRefused. Nothing is checked twice in a file that opens."""
    _read_header(path)
    try:
        handle: Any = safe_open(path, framework="pt", device="cpu", backend="pread")
        return {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        slices, spare_bytes = padded_slices(path, one_line(error))
    log.warning("%s has %d bytes behind its data; they are not read", path, spare_bytes)
    return dict(slices)


def _read_header(path: Path) -> None:
    """Ask for the header's pages alone, so that they are there when safetensors wants them.

    Its own read lets the system read on into the weights, megabytes in each file. Asked apart, too,
    because what safetensors says of a file that it may not read is another cause.
    """
    refuse_stand_in(path)
    with readable(path), path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        file.read(min(length, MAX_HEADER_BYTES))
