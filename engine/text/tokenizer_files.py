"""The files that a tokenizer is read from: damaged ones are named before a library stumbles."""

import logging
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from moestro.engine.facts import ModelRefused
from moestro.engine.weights import is_there, json_object, refuse_stand_in

log = logging.getLogger("moestro.engine")

FAST_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"
JSON_NAMES = (FAST_NAME, CONFIG_NAME, "special_tokens_map.json", "added_tokens.json")
READ_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError)
SLOW_NAMES = ("tokenizer.model", "tekken.json", "vocab.json", "merges.txt")  # without FAST_NAME


def refuse_stand_ins(folder: Path) -> None:
    """Raises ModelNotFound for links to nowhere, ModelRefused for pointers of Git LFS, web pages
    and empty files. What transformers would not read is not looked at.
    """
    fast = is_there(folder / FAST_NAME)
    for name in (*JSON_NAMES, TEMPLATE_NAME, *(() if fast else SLOW_NAMES)):
        if is_there(folder / name) and not _says_nothing(folder / name):
            refuse_stand_in(folder / name)


def _says_nothing(path: Path) -> bool:
    """An empty template is one, and makes every chat's prompt empty: the maker's own wish."""
    return path.name == TEMPLATE_NAME and path.is_file() and path.stat().st_size == 0


class RefusingTokenizer:
    """Around reading a tokenizer: turns what the libraries raise over it into ModelRefused.

    `tokenizers` has no error of its own: it raises `Exception` itself, which only this tells from
    its subclasses.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if kind is Exception:
            raise ModelRefused(
                f"{self._folder / FAST_NAME} is not one that tokenizers {version('tokenizers')}"
                f" reads: {' '.join(str(error).split())}; fetch it again, or the release of the"
                " model that this version knows"
            ) from error
        if isinstance(error, READ_ERRORS):
            _refuse(self._folder, error)


class RefusingGguf:
    """The same around a tokenizer that is read out of a GGUF file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if kind is Exception or isinstance(error, READ_ERRORS):
            words = " ".join(str(error).split()) or type(error).__name__
            raise ModelRefused(
                f"{self._path} has no tokenizer that can be read: {words}; fetch the file again, or"
                " one of another converter"
            ) from error


def _refuse(folder: Path, error: Exception) -> NoReturn:
    """Raises ModelRefused: which file is at fault, else in the words of `error`."""
    found = {name: json_object(folder / name, "a tokenizer's file") for name in JSON_NAMES}
    words = " ".join(str(error).split()) or type(error).__name__
    if found[CONFIG_NAME].get("auto_map"):
        raise ModelRefused(
            f"{folder / CONFIG_NAME} wants code of its own (auto_map) for the tokenizer"
            f" {found[CONFIG_NAME].get('tokenizer_class')!r}; moestro runs no code out of a"
            f" checkpoint, and without it: {words}; this needs a {FAST_NAME}, or a release of"
            " transformers that knows the tokenizer"
        ) from error
    raise ModelRefused(
        f"{folder} has no tokenizer that can be read: {words}; fetch tokenizer.json and"
        " tokenizer_config.json again"
    ) from error


def log_own_code(folder: Path) -> None:
    """Once, where the tokenizer's config names code that was not run."""
    path = folder / CONFIG_NAME
    if json_object(path, "a tokenizer's config").get("auto_map"):
        log.info("%s: auto_map is ignored and no code of the folder is run", path)
