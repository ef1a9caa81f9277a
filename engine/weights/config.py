"""A model's config.json as transformers understands it. Runs no code of the folder's own."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moestro.engine.facts import ModelNotFound, ModelRefused
from moestro.engine.quantized import Quantization, quantization_of, refuse_method

from .damage import COPY_AGAIN, is_dangling, json_object, one_line, read_json, readable
from .routers import stock_config
from .weight_files import gguf_source

log = logging.getLogger("moestro.engine")

CONFIG_NAME = "config.json"


def read_config(folder: Path) -> PreTrainedConfig:
    """Without `auto_map`, so that nothing which is built from it looks for code.

    Raises ModelNotFound or ModelRefused.
    """
    path = folder / CONFIG_NAME
    if (source := gguf_source(folder)) is not None:
        with refusing(str(source.paths[0])):
            return _decoded(source.config())
    with readable(folder):
        if not folder.is_dir():
            raise ModelNotFound(
                f"{folder} is not a folder; give a Hugging Face model folder, a GGUF file or `demo`"
            )
        _refuse_without_blobs(folder)
        if not path.exists() and not path.is_symlink():
            raise ModelNotFound(f"{folder} has no {CONFIG_NAME}: not a Hugging Face model folder")
    raw = read_json(path, "a config")
    if not isinstance(raw, dict):
        raise ModelRefused(f"{path} is not a JSON object")
    carried = stock_config(path, raw)
    if carried is not raw:
        return _stock(path, carried)
    if raw.get("auto_map"):
        _refuse_own_code(path, raw.get("model_type"))
    quantization_of(path, raw)  # its own words for what transformers would fall over
    with refusing(str(path)):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    vars(config).pop("auto_map", None)
    return _decoded(config)


def _decoded(config: PreTrainedConfig) -> PreTrainedConfig:
    """Without a word of how its files are quantized: what is loaded is decoded."""
    parts = (config, config.get_text_config())
    for part in (each for each in parts if isinstance(each, PreTrainedConfig)):
        vars(part).pop("quantization_config", None)
    return config


def read_quantization(folder: Path) -> Quantization | None:
    """What the config says of how the files are quantized.

    Raises ModelRefused, also for a method that is not carried.
    """
    path = folder / CONFIG_NAME
    if gguf_source(folder) is not None:
        return None
    raw = read_json(path, "a config")
    found = quantization_of(path, raw) if isinstance(raw, dict) else None
    if found is not None:
        refuse_method(found)
    return found


def _stock(path: Path, carried: dict[str, Any]) -> PreTrainedConfig:
    """Of the stock class whose routers are in a file of ours. Raises ModelRefused."""
    for name in ("auto_map", "quantization_config"):
        if name in carried:
            raise ModelRefused(f"{path}: {name} beside routers of moestro is not carried")
    with refusing(str(path)):
        config: PreTrainedConfig = CONFIG_MAPPING[carried["model_type"]].from_dict(carried)
    return config


def _refuse_without_blobs(folder: Path) -> None:
    """Where config.json and every other link of the folder lead nowhere, the folder is named."""
    links = sorted(entry for entry in folder.iterdir() if entry.is_symlink())
    nowhere = [link for link in links if is_dangling(link)]
    if folder / CONFIG_NAME in nowhere and len(nowhere) > 1 and nowhere == links:
        raise ModelNotFound(
            f"{folder} has only links without their files ({len(links)}; {CONFIG_NAME} leads to"
            f" {(folder / CONFIG_NAME).readlink()}), as a hub snapshot that was copied without its"
            f" blobs; {COPY_AGAIN}"
        )


def _refuse_own_code(path: Path, kind: Any) -> None:
    """Raises ModelRefused for a type that only the folder's own code knows; else says it once."""
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ModelRefused(
            f"{path} wants code of its own (auto_map) for the type {kind!r}, which transformers"
            f" {version('transformers')} does not know; moestro runs no code out of a checkpoint:"
            " this model needs a release of transformers that knows the type"
        )
    log.info(
        "%s: auto_map is ignored and no code of the folder is run; transformers has the type %r"
        " itself",
        path,
        kind,
    )


CONFIG_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """The one place that turns whatever transformers raises over a config into a refusal.

    Wrong types and numbers end in errors of many kinds there: strict dataclasses, divisions by
    zero, assertions of torch, names that are not found.
    """
    try:
        yield
    except CONFIG_ERRORS as error:
        raise ModelRefused(f"{what}: {_named(error)}") from error


def _named(error: Exception) -> str:
    """Errors whose text alone says nothing (a key, a bare assertion) with their kind."""
    line = one_line(error)
    plain = isinstance(error, (KeyError, AssertionError, AttributeError, ArithmeticError))
    return f"{type(error).__name__}: {line}" if plain else line


def warn_disagreements(folder: Path, model: PreTrainedModel) -> None:
    """What a config.json says twice, outside and inside its text_config, and not the same.

    Stock transformers decides which one counts, by the model's class; the log says which it was.
    One line for each value. `model` is as transformers has built it, nothing untied yet."""
    raw = json_object(folder / "config.json", "a config")
    inner = raw.get("text_config")
    if not isinstance(inner, dict):
        return
    used = {
        "tie_word_embeddings": bool(model.all_tied_weights_keys),
        "vocab_size": model.config.get_text_config().vocab_size,
    }
    for name, value in used.items():
        if name in raw and name in inner and raw[name] != inner[name]:
            warn_disagreement(folder, name, raw[name], inner[name], value)


def warn_disagreement(folder: Path, name: str, outer: object, inner: object, used: object) -> None:
    log.warning(
        "%s: config.json has %s %r, and in its text_config %r; %r counts, as in transformers",
        folder,
        name,
        outer,
        inner,
        used,
    )
