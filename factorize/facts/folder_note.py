"""What a folder held when moestro made it: a note inside, so that damage is seen at a start.

Sizes of all files, and hashes: of small files they are compared at once, of large ones only when
their time has changed. Knows no model.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from moestro.cache import read_fields

NOTE_NAME = ".moestro-files.json"
LEAST_WEIGHTS = "model.safetensors"
LEAST_JSON = ("config.json", "tokenizer.json", "tokenizer_config.json")
HASH_AT_ONCE_BYTES = 16 << 20  # of one file: some milliseconds
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _File:
    size_bytes: int
    time_ns: int
    sha256: str


def write_note(folder: Path) -> None:
    """Of all files in `folder`, which is finished. Appears whole, or not at all."""
    files = {path.name: asdict(_look(path)) for path in _files(folder)}
    aside = folder / f"{NOTE_NAME}.{os.getpid()}"
    aside.write_text(json.dumps(files, indent=1), "utf-8")
    aside.replace(folder / NOTE_NAME)


def damage(folder: Path) -> str | None:
    """What is not as it was made, in words; None where all is, or there is no note to say so."""
    try:
        noted = json.loads((folder / NOTE_NAME).read_bytes())
        files = {str(name): read_fields(_File, fields) for name, fields in noted.items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    for name, file in files.items():
        found = _differs(folder / name, file)
        if found is not None:
            return f"{folder / name} {found}"
    return None


def looks_whole(folder: Path) -> bool:
    """Whether what no model can do without is there and can be opened, as far as a glance tells."""
    try:
        for name in LEAST_JSON:
            json.loads((folder / name).read_bytes())
        with safe_open(folder / LEAST_WEIGHTS, "pt"):
            return True
    except (OSError, ValueError, RecursionError, SafetensorError):
        return False


def _differs(path: Path, noted: _File) -> str | None:
    try:
        stat = path.stat()
        if stat.st_size != noted.size_bytes:
            return f"has {stat.st_size} bytes instead of {noted.size_bytes}"
        if noted.size_bytes > HASH_AT_ONCE_BYTES and stat.st_mtime_ns == noted.time_ns:
            return None
        return None if file_sha256(path) == noted.sha256 else "has another checksum"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _files(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.iterdir() if path.is_file() and not path.name.startswith(NOTE_NAME)
    )


def _look(path: Path) -> _File:
    stat = path.stat()
    return _File(stat.st_size, stat.st_mtime_ns, file_sha256(path))


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
