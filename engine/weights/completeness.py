"""Whether the files hold every tensor that the model wants, judged by names, before any is read.

Where transformers' conversions make one tensor of several, each of the several is asked for. What
cannot be judged by names is let through; loading refuses it then.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel
from transformers.core_model_loading import MergeModulelist, WeightConverter

from moestro.engine.facts import ModelRefused

from .damage import few

Renamed = tuple[str, str | None]  # the model's name, and the converter's pattern that gave it


def refuse_missing(
    folder: Path,
    model: PreTrainedModel,
    converters: list[WeightConverter],
    renamed: Mapping[str, Renamed],
) -> None:
    """`renamed` is for each key of the files. Raises ModelRefused that names what is missing."""
    used = _used(converters, renamed)
    lost = _lost_targets(model, used, renamed) + _lost_parts(model, used, renamed)
    if lost:
        raise ModelRefused(f"{folder}: tensors are missing in the files: {few(lost)}")


def _used(
    converters: list[WeightConverter], renamed: Mapping[str, Renamed]
) -> dict[str, WeightConverter]:
    """The converters that take keys of these files, by their patterns."""
    patterns = {pattern for _, pattern in renamed.values()}
    return {
        pattern: converter
        for converter in converters
        for pattern in converter.source_patterns
        if patterns.intersection(converter.source_patterns)
    }


def _lost_targets(
    model: PreTrainedModel, used: dict[str, WeightConverter], renamed: Mapping[str, Renamed]
) -> list[str]:
    wanted = model.state_dict()
    found = set()
    for target, pattern in renamed.values():
        found.add(target)
        targets = used[pattern].target_patterns if pattern is not None else []
        others = {target.replace(targets[0], other) for other in targets[1:]}
        if not others <= wanted.keys():
            return []  # the names of the rest are the conversion's own knowledge
        found |= others
    for tied, source in model.all_tied_weights_keys.items():
        if tied in found:
            found.add(source)
    found |= {tied for tied, source in model.all_tied_weights_keys.items() if source in found}
    optional = [re.compile(text) for text in model._keys_to_ignore_on_load_missing or ()]
    return [
        name
        for name in wanted
        if name not in found and not any(pattern.search(name) for pattern in optional)
    ]


def _lost_parts(
    model: PreTrainedModel, used: dict[str, WeightConverter], renamed: Mapping[str, Renamed]
) -> list[str]:
    """Of tensors that are stacked from one per expert: each expert must bring each part."""
    counts = Counter(renamed.values())
    wanted = model.state_dict()
    lost = []
    for target, pattern in list(counts):
        converter = used.get(pattern) if pattern is not None else None
        if converter is None or target not in wanted or not _stacks(converter):
            continue
        experts = wanted[target].shape[0]
        for part in converter.source_patterns:
            here = counts[target, part]
            if here < experts:
                lost.append(f"{target} ({here} of {experts} of {part})")
    return list(dict.fromkeys(lost))


def _stacks(converter: WeightConverter) -> bool:
    return len(converter.target_patterns) == 1 and any(
        isinstance(operation, MergeModulelist) and operation.dim == 0
        for operation in converter.operations
    )
