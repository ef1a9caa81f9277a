"""Which files are the GGUF model that a path names: one, or its parts in order. No tensors."""

import re
from pathlib import Path

from moestro.engine.facts import ModelNotFound, ModelRefused

from .header import is_gguf

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
SHOWN = 5
OTHERS = (".safetensors",)  # weights that come first where a folder has both


def gguf_paths(path: Path) -> tuple[Path, ...] | None:
    """In order. None where `path` names no GGUF: anything else, or nothing at all.

    Raises ModelRefused where a folder has several models, ModelNotFound where a part is missing;
    OSError where a folder cannot be listed.
    """
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())
        found = [name for name in names if is_gguf(Path(name))]
        if not found or any(name.endswith(OTHERS) for name in names):
            return None
        models: dict[str, str] = {}
        for name in found:
            models.setdefault(_model(name), name)
        if len(models) > 1:
            raise ModelRefused(_several(path, list(models.values())))
        return _parts(path / found[0])
    if not is_gguf(path) or not path.exists():
        return None
    return _parts(path)


def gguf_stem(path: Path) -> str:
    """The file's name without its ending, and without its place among parts."""
    part = PART.fullmatch(path.name)
    return part["stem"] if part is not None else path.name[: -len(".gguf")]


def _model(name: str) -> str:
    """The same for all parts of a model."""
    part = PART.fullmatch(name)
    return f"{part['stem']}-of-{part['count']}" if part is not None else name


def _several(folder: Path, names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (
        f"{folder} has {len(names)} GGUF models ({', '.join(names[:SHOWN])}{more}); name one of the"
        f" files, as in `moestro serve {folder / names[0]}`"
    )


def _parts(path: Path) -> tuple[Path, ...]:
    part = PART.fullmatch(path.name)
    if part is None:
        return (path,)
    count = int(part["count"])
    names = [
        f"{part['stem']}-{number:05}-of-{part['count']}{path.suffix}"
        for number in range(1, count + 1)
    ]
    lost = [name for name in names if not (path.parent / name).exists()]
    if lost or not names:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise ModelNotFound(
            f"{path.parent}: {lost[0] if lost else path.name}{more} of the {count} parts of"
            f" {part['stem']} is missing; fetch it into the same folder"
        )
    return tuple(path.parent / name for name in names)
