"""Which files of a repository are needed. Decides with names and sizes alone.

Those of the top folder that the engine reads, and no other: not the same weights as pickles, as
`consolidated`, under `original/` or for another library, and no pictures.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ROUTERS_NAME = "moestro_routers.safetensors"  # of a factorized model: no weights of its own
WEIGHTS = ".safetensors"

# What decides the shapes; small.
SHAPES = frozenset({CONFIG_NAME, INDEX_NAME, "moestro.json", ROUTERS_NAME})
TEXT = frozenset(
    {
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "tokenizer.model",
        "tekken.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
        "processor_config.json",
        "preprocessor_config.json",
        "moestro_dense.json",
    }
)
TEMPLATES = "additional_chat_templates"
MOST_KINDS = 4  # in a refusal


@dataclass(frozen=True, slots=True)
class RepoFile:
    """`blob` is its name in the hub's cache: the SHA-256 of what is stored apart (Git LFS), else
    the SHA-1 that git gives it.
    """

    name: str
    size_bytes: int
    blob: str

    @property
    def has_sha256(self) -> bool:
        return len(self.blob) == 64


class NotServable(ValueError):
    """The repository has not what is needed; the text says what it has."""


def for_shapes(files: Sequence[RepoFile]) -> list[RepoFile]:
    """What a plan needs. Raises NotServable."""
    found = [file for file in files if file.name in SHAPES]
    if all(file.name != CONFIG_NAME for file in found):
        raise NotServable(f"it has no {CONFIG_NAME}; it has {_kinds(files)}")
    return found


def for_text(files: Sequence[RepoFile]) -> list[RepoFile]:
    """Tokenizer, chat templates and the settings of generation."""
    return [file for file in files if file.name in TEXT or _is_template(file.name)]


def for_weights(files: Sequence[RepoFile], shards: Collection[str] | None) -> list[RepoFile]:
    """The weights, as the engine will choose them; `shards`: those of the index, if there is one.

    Raises NotServable.
    """
    of_name = {file.name: file for file in files if "/" not in file.name}
    if shards is not None:
        lost = sorted(set(shards) - of_name.keys())
        if lost:
            raise NotServable(f"its {INDEX_NAME} names {lost[0]}, which it does not have")
        return [of_name[name] for name in sorted(set(shards))]
    if SINGLE_NAME in of_name:
        return [of_name[SINGLE_NAME]]
    found = [n for n in of_name if n.endswith(WEIGHTS) and n != ROUTERS_NAME]
    if not found:
        raise NotServable(f"it has no {WEIGHTS} files; it has {_kinds(files)}")
    if len(found) > 1:
        raise NotServable(
            f"it has {len(found)} {WEIGHTS} files and no {INDEX_NAME} that says which belong"
            " together"
        )
    return [of_name[found[0]]]


def total_bytes(files: Iterable[RepoFile]) -> int:
    return sum(file.size_bytes for file in files)


def _is_template(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix == ".jinja" and path.parts[:-1] == (TEMPLATES,) and path.stem != ""


def _kinds(files: Sequence[RepoFile]) -> str:
    """'3 .bin, 2 .json': what is there instead."""
    count = Counter(PurePosixPath(file.name).suffix or file.name for file in files)
    words = [f"{number} {kind}" for kind, number in count.most_common(MOST_KINDS)]
    return ", ".join(words) if words else "no files"
