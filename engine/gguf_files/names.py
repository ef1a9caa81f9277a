"""Tensors of a GGUF file as those of transformers' own class for its architecture.

No table of names and no arithmetic of its own: transformers has two readers of GGUF, an older one
by tensor processors and a newer one by weight conversions, and each architecture belongs to one of
them. Both are asked for a tensor at a time here, and for stacked experts an expert at a time.
"""

from collections.abc import Mapping
from copy import deepcopy
from functools import partial, reduce
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.integrations.gguf.utils import (
    get_gguf_conversion_mapping,
    is_gguf_arch_supported,
)
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from moestro.engine.facts import ModelRefused
from moestro.engine.quantized import Decoded, Grid

from .blocks import FORMS, BlockPart
from .stored import Stored

Parts = Mapping[str, torch.Tensor]
Found = dict[str, Decoded]  # by the model's name
NO_EXPERTS = "its experts are not stacked"
STACKED = 3  # dimensions of a tensor with all experts of a layer


def plain_tensors(
    architecture: str, config: Any, model: PreTrainedModel, tensors: Mapping[str, Stored]
) -> tuple[Found, set[str]]:
    """For `model`, on meta; and the names of the file that it has no place for.

    Numbers are float32 where they lie in blocks or are no matrix, else of their own type: what
    transformers makes of them without a dtype, bit by bit. Raises ModelRefused for shapes that are
    not the model's.
    """
    newer = is_gguf_arch_supported(architecture)
    find = _by_conversions if newer else _by_processors
    return find(architecture, config, model, tensors)


def _by_processors(
    architecture: str, config: Any, model: PreTrainedModel, tensors: Mapping[str, Stored]
) -> tuple[Found, set[str]]:
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())  # type: ignore[no-untyped-call]
    names: dict[str, str] = get_gguf_hf_weights_map(model, processor)
    groups: dict[str, dict[str, Stored]] = {}
    for name, tensor in tensors.items():
        # experts are in the map without their suffix, too
        target = names.get(name) or names.get(name.removesuffix(".weight"))
        if target is not None:
            groups.setdefault(target, {})[name] = tensor
    spare = tensors.keys() - {name for group in groups.values() for name in group}
    found = {
        target: _decoded(group, model, target, partial(_processed, processor, names, target))
        for target, group in groups.items()
    }
    return found, set(spare)


def _processed(
    processor: TensorProcessor, names: dict[str, str], target: str, parts: Parts
) -> torch.Tensor:
    """Of one tensor, or those that transformers writes into one."""
    stacked = next(iter(parts.values())).dim() == STACKED - 1 and "_exps." in next(iter(parts))
    parsed: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
    for name, values in parts.items():
        result = processor.process(  # type: ignore[no-untyped-call]
            values[None].numpy() if stacked else values.numpy(),
            name,
            tensor_key_mapping=names,
            parsed_parameters=parsed,
        )
        if result.name is not None:
            parsed["tensors"][target] = torch.from_numpy(result.weights)
    (made,) = parsed["tensors"].values()
    return made[0] if stacked else made


def _by_conversions(
    architecture: str, config: Any, model: PreTrainedModel, tensors: Mapping[str, Stored]
) -> tuple[Found, set[str]]:
    mapping = deepcopy(get_gguf_conversion_mapping(architecture, config))
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    of_pattern = {
        pattern: converter for converter in converters for pattern in converter.source_patterns
    }
    wanted = model.state_dict()
    groups: dict[str, dict[str, Stored]] = {}
    converter_of: dict[str, WeightConverter | None] = {}
    patterns: dict[str, str] = {}
    for name, tensor in tensors.items():
        target, pattern = rename_source_key(name, renamings, converters)
        if target in wanted:
            groups.setdefault(target, {})[name] = tensor
            converter_of[target] = of_pattern[pattern] if pattern is not None else None
            patterns[name] = pattern if pattern is not None else name
    spare = tensors.keys() - {name for group in groups.values() for name in group}
    found = {}
    for target, group in groups.items():
        converter = converter_of[target]
        order = converter.source_patterns if converter is not None else list(patterns.values())
        ordered = dict(sorted(group.items(), key=lambda item: order.index(patterns[item[0]])))
        decode = partial(_converted, converter, target, {name: patterns[name] for name in ordered})
        found[target] = _decoded(ordered, model, target, decode)
    return found, set(spare)


def _converted(
    converter: WeightConverter | None, target: str, patterns: Mapping[str, str], parts: Parts
) -> Any:
    stacked = next(iter(parts.values())).dim() == STACKED - 1 and "_exps." in next(iter(parts))
    values: Any = {
        patterns[name]: [part[None] if stacked else part] for name, part in parts.items()
    }
    if converter is None:
        ((whole,),) = values.values()
        return whole[0] if stacked else whole
    for operation in converter.operations:
        values = operation.convert(
            values,
            source_patterns=converter.source_patterns,
            target_patterns=[target],
            full_layer_name=target,
        )
    made = next(iter(values.values()))
    whole = made[0] if isinstance(made, list) else made
    return whole[0] if stacked else whole


def _decoded(
    group: Mapping[str, Stored], model: PreTrainedModel, target: str, decode: Any
) -> Decoded:
    """With the model's shape. Raises ModelRefused where the file's does not come to it."""
    first = next(iter(group.values()))
    wanted = model.get_parameter_or_buffer(target).shape
    numbers = sum(torch.Size(tensor.shape).numel() for tensor in group.values())
    if numbers != wanted.numel() or not _same_sizes(first, wanted, len(group)):
        raise ModelRefused(
            f"{first.entry.path}: tensor {first.entry.name} is {first.shape}, and {target}"
            f" {tuple(wanted)} by the file's own fields; the file is damaged, fetch it again"
        )
    dtype = torch.float32
    if len(first.shape) > 1:
        dtype = reduce(torch.promote_types, [tensor.dtype for tensor in group.values()])
    leading = len(first.shape) == STACKED
    grid = _grid(group, tuple(wanted), decode) if leading else NO_EXPERTS
    return Decoded(tuple(wanted), dtype, group, decode, leading, grid)


def _grid(group: Mapping[str, Stored], wanted: tuple[int, ...], decode: Any) -> Grid | str:
    """Of stacked experts: each part goes the way that the decoded numbers go."""
    kinds = {tensor.kind for tensor in group.values()}
    form = FORMS.get(next(iter(kinds)))
    if form is None or len(kinds) > 1 or any(t.shape[-1] != wanted[-1] for t in group.values()):
        return (
            f"numbers of {' and '.join(sorted(kind.name for kind in kinds))} are no int4 of tiles"
        )

    def part(name: str, dtype: torch.dtype) -> Decoded:
        parts = {key: BlockPart(tensor, name) for key, tensor in group.items()}
        width = next(iter(parts.values())).get_shape()[-1]
        return Decoded((*wanted[:-1], width), dtype, parts, decode, leading=True)

    zeros = part("zeros", torch.float16) if form.zero == "float" else None
    return Grid(form, part("codes", torch.uint8), part("scales", torch.float16), zeros)


def _same_sizes(first: Stored, wanted: torch.Size, parts: int) -> bool:
    """Apart from dimensions of one, and of several parts from the one that they follow along."""
    if parts > 1:
        return first.shape[0] == wanted[0] and first.shape[-1] == wanted[-1]
    return [size for size in first.shape if size > 1] == [size for size in wanted if size > 1]
