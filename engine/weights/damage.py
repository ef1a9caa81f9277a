"""What may lie in a model's folder where a file should be, told from each other and named.

A link is followed wherever it leads, as hub snapshots need it (`../../blobs/…`) and people who keep
weights on another disk do: whoever names the folder can read what its links lead to anyway. Of a
file that is no checkpoint nothing is shown but how it begins. A link to nowhere is a file that is
missing, and is never taken for one that the model does without. Knows no format of weights.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from moestro.engine.facts import ModelNotFound, ModelRefused

MAX_CAUSE_CHARS = 300
HEAD_BYTES = 512  # enough to tell what a file is
_POINTER = b"version https://git-lfs.github.com/spec/"
_PAGE = re.compile(rb"\s*<(!doctype|html|head|\?xml|!--)", re.IGNORECASE)
COPY_AGAIN = (
    "copy the folder again with its links followed (`cp -rL`, `rsync -rL`), or download it again"
)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Whatever keeps the system from reading `path`, as one line with its cause."""
    try:
        yield
    except OSError as error:
        gone = isinstance(error, (FileNotFoundError, NotADirectoryError))
        kind = ModelNotFound if gone else ModelRefused
        raise kind(f"cannot read {path}: {error.strerror or one_line(error)}") from error


def is_there(path: Path) -> bool:
    """False where the folder has no such name. Raises ModelNotFound for a link to nowhere."""
    with readable(path):
        refuse_dangling(path)
        return path.exists()


def refuse_dangling(path: Path) -> None:
    """Raises ModelNotFound where `path` is a link to something that does not exist."""
    if is_dangling(path):
        raise ModelNotFound(
            f"{path} is a link to {path.readlink()}, which does not exist; {COPY_AGAIN}"
        )


def is_dangling(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def refuse_stand_in(path: Path) -> None:
    """Raises ModelRefused for a file that is here only in name: a folder or pipe, empty, a pointer
    of Git LFS, a web page; ModelNotFound for a link to nowhere or no file at all.
    """
    with readable(path):
        refuse_dangling(path)
        if path.exists() and not path.is_file():
            raise ModelRefused(f"{path} is not a regular file; fetch it again")
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no page beyond is read
            head = file.read(HEAD_BYTES)
    if not head.strip():
        raise ModelRefused(
            f"{path} is empty ({path.stat().st_size} bytes without content); fetch it again"
        )
    if head.startswith(_POINTER):
        raise ModelRefused(_pointer_words(path, head))
    if _PAGE.match(head.removeprefix(b"\xef\xbb\xbf")):
        raise ModelRefused(
            f"{path} is a web page of {path.stat().st_size} bytes (HTML), as a failed download"
            " leaves it; fetch the file itself again"
        )


def _pointer_words(path: Path, head: bytes) -> str:
    said = re.search(rb"^size (\d+)$", head, re.MULTILINE)
    size = f", of {int(said[1])} bytes," if said else ""
    return (
        f"{path} is a Git LFS pointer of {path.stat().st_size} bytes, not the file{size} that it"
        " stands for; fetch that with `git lfs pull` in the folder, or with `hf download` (once"
        " `huggingface-cli download`)"
    )


def read_json(path: Path, what: str) -> Any:
    """Of a file that must be here. Raises ModelNotFound, or ModelRefused, naming `what` it should
    have been.
    """
    refuse_stand_in(path)
    with readable(path):
        text = path.read_bytes()
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelRefused(
            f"{path} is not {what}: no JSON, in its {len(text)} bytes ({one_line(error)}); fetch it"
            " again"
        ) from error


def json_object(path: Path, what: str) -> dict[str, Any]:
    """{} where there is no such file. Raises ModelRefused, naming `what` it should have been,
    and ModelNotFound for a link to nowhere.
    """
    if not is_there(path):
        return {}
    found = read_json(path, what)
    if not isinstance(found, dict):
        raise ModelRefused(f"{path} is not {what}: no JSON object")
    return found


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


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """What safetensors says when it reads a tensor of a file that has changed meanwhile."""
    try:
        yield
    except SafetensorError as error:
        raise ModelRefused(f"{folder}: {one_line(error)}") from error
