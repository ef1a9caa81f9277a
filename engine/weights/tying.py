"""Tied weights that the files hold under both names, where transformers ties by their values.

Equal ones are one tensor, read once. Where they differ, the files are right and the flag
(`tie_word_embeddings`) is wrong: both are loaded, as stock transformers does. Knows no format.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

log = logging.getLogger("moestro.engine")

_NUMBERS_AT_ONCE = 1 << 22  # compared: their copies stay small


def tied_twice(model: PreTrainedModel, targets: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(name in the model, its key, key of what it is tied to) where the files hold both.

    `targets` is {key of the files: the model's name}.
    """
    keys = {target: key for key, target in targets.items()}
    return [
        (tied, keys[tied], keys[source])
        for tied, source in model.all_tied_weights_keys.items()
        if tied in keys and source in keys
    ]


def same_numbers(one: Any, other: Any) -> bool:
    """Whether two slices of safetensors files hold the same; a part at a time."""
    shape = one.get_shape()
    if shape != other.get_shape():
        return False
    rows = max(1, _NUMBERS_AT_ONCE // max(1, torch.Size(shape[1:]).numel()))
    for start in range(0, shape[0], rows):
        end = min(start + rows, shape[0])
        left, right = one[start:end], other[start:end]
        dtype = torch.promote_types(left.dtype, right.dtype)
        if not torch.equal(left.to(dtype), right.to(dtype)):
            return False
    return True


def untie(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Give `model`, on meta, parameters of their own under `names`."""
    for name in names:
        path, _, last = name.rpartition(".")
        shared = model.get_parameter(name)
        own = torch.nn.Parameter(torch.empty_like(shared), requires_grad=shared.requires_grad)
        model.get_submodule(path).register_parameter(last, own)
        del model.all_tied_weights_keys[name]


def warn_untied(folder: Path, name: str, source: str) -> None:
    log.warning(
        "%s: config.json ties %s to %s, but the files hold other numbers for each: both are used"
        " (tie_word_embeddings should be false)",
        folder,
        name,
        source,
    )
