"""The files of a model's folder: which hold its weights, opened and listed, each key once.

The choice is transformers' own, so that a stray file is never read: those of the index, else
model.safetensors, else the only one. Pickles are never opened.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from moestro.engine.facts import ModelNotFound, ModelRefused

log = logging.getLogger("moestro.engine")

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_CAUSE_CHARS = 300
LENGTH_BYTES = 8  # of the header, in front of it
MAX_HEADER_BYTES = 100_000_000  # that safetensors takes


def weight_files(folder: Path) -> list[Path]:
    """At least one. Raises ModelNotFound, or ModelRefused for files that are here but not carried.

    Among the refused: shards that are missing, files of which none is known to be the model.
    """
    with readable(folder):
        names = sorted(entry.name for entry in folder.iterdir())
    found = [name for name in names if name.endswith(".safetensors")]
    if INDEX_NAME in names:
        chosen = sorted(set(weight_map(folder).values()))
        for name in chosen:
            if name not in found:
                raise ModelRefused(f"{folder}: shard {name} is missing; fetch it again")
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
    unread = sorted(set(found) - set(chosen))
    if unread:
        log.info("not read, because the model is in other files: %s", few(unread))
    return [folder / name for name in chosen]


def _refuse_pickles(folder: Path, names: list[str]) -> None:
    pickled = [name for name in names if Path(name).suffix in (".bin", ".pt", ".pth")]
    if pickled:
        raise ModelRefused(
            f"{folder} has only {pickled[0]}, which can run code when it is opened;"
            " use a version of the model with .safetensors files"
        )
    raise ModelNotFound(f"{folder} has no .safetensors files")


def weight_map(folder: Path) -> dict[str, str]:
    """{tensor: file's name} of the index. Raises ModelRefused where it is none."""
    path = folder / INDEX_NAME
    with readable(path):
        text = path.read_bytes()
    try:
        found = json.loads(text)["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelRefused(f"{path} is not a weight index: {one_line(error)}") from error
    if not isinstance(found, dict) or not found:
        raise ModelRefused(f"{path} is not a weight index: weight_map names no tensors")
    for name in found.values():
        if not isinstance(name, str) or name != Path(name).name or not name:
            raise ModelRefused(f"{path} is not a weight index: {name!r} is not a file's name")
    return found


def json_object(path: Path, what: str) -> dict[str, Any]:
    """{} where there is no such file. Raises ModelRefused, naming `what` it should have been."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelRefused(f"{path} is not {what}: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise ModelRefused(f"{path} is not {what}: no JSON object")
    return found


def open_weights(paths: list[Path]) -> dict[str, tuple[Path, Any]]:
    """{key: (file, slice)} of all files. Raises ModelRefused, also where two have the same key."""
    found: dict[str, tuple[Path, Any]] = {}
    for path in paths:
        handle = _open_safetensors(path)
        for key in handle.keys():  # noqa: SIM118 (not a dict)
            if key in found:
                raise ModelRefused(
                    f"{path.parent}: tensor {key} is in {found[key][0].name} and in {path.name}"
                )
            found[key] = (path, handle.get_slice(key))
    if paths and (paths[0].parent / INDEX_NAME).is_file():
        lost = [key for key in weight_map(paths[0].parent) if key not in found]
        if lost:
            raise ModelRefused(
                f"{paths[0].parent}: tensors of the index are missing in its files: {few(lost)}"
            )
    return found


def _open_safetensors(path: Path) -> Any:
    _read_header(path)
    try:
        return safe_open(path, framework="pt", device="cpu", backend="pread")
    except (SafetensorError, OSError) as error:
        raise ModelRefused(
            f"{path} is not a whole safetensors file ({one_line(error)}); fetch it again"
        ) from error


def _read_header(path: Path) -> None:
    """Ask for the header's pages alone, so that they are there when safetensors wants them.

    Its own read lets the system read on into the weights, megabytes in each file. Asked apart, too,
    because what safetensors says of a file that it may not read is another cause.
    """
    with readable(path), path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        file.read(min(length, MAX_HEADER_BYTES))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Whatever keeps the system from reading `path`, as one line with its cause."""
    try:
        yield
    except OSError as error:
        gone = isinstance(error, (FileNotFoundError, NotADirectoryError))
        kind = ModelNotFound if gone else ModelRefused
        raise kind(f"cannot read {path}: {error.strerror or one_line(error)}") from error


def one_line(error: object) -> str:
    """An error's first line; with the next one, where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return line if len(line) <= MAX_CAUSE_CHARS else f"{line[:MAX_CAUSE_CHARS]}…"


def few(keys: Any) -> str:
    names = sorted(keys)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
