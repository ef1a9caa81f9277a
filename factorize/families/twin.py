"""The twin's class: GraniteMoeShared, or its sibling whose layers can have windows or no positions.

The sibling's attention adds an always-seen sink to each head; at this depth it weighs nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import GraniteMoeSharedConfig, GraniteMoeSWAConfig

from .family import LayerKind

SINK = -(2.0**14)  # exp(SINK) is 0 in all types, and SINK is exact in them
SINKS = "self_attn.sinks"


# GraniteMoeShared's checkpoint has older names than its class; the sibling's has its class's names
RENAMED = (
    (".router.layer.weight", ".router.weight"),
    (".block_sparse_moe.input_linear.weight", ".block_sparse_moe.experts.gate_up_proj"),
    (".block_sparse_moe.output_linear.weight", ".block_sparse_moe.experts.down_proj"),
)


def stored_name(name: str, kinds: Sequence[LayerKind]) -> str:
    """In the twin's checkpoint, of the tensor that GraniteMoeShared's calls `name`."""
    if all(kind == LayerKind() for kind in kinds):
        return name
    for old, new in RENAMED:
        name = name.replace(old, new)
    return name


def twin_class(kinds: Sequence[LayerKind]) -> tuple[Any, str]:
    """(class of the configuration, name of the model's class)."""
    if all(kind == LayerKind() for kind in kinds):
        return GraniteMoeSharedConfig, "GraniteMoeSharedForCausalLM"
    return GraniteMoeSWAConfig, "GraniteMoeSWAForCausalLM"


def layer_fields(
    kinds: Sequence[LayerKind], rope: Mapping[str, Any], context_tokens: int
) -> dict[str, Any]:
    """Fields of the sibling's configuration; none where the layers are all plain."""
    if all(kind == LayerKind() for kind in kinds):
        return {}
    windows = {kind.window for kind in kinds} - {None}
    assert len(windows) <= 1, "a family has one width"
    return {
        "layer_types": ["sliding_attention" if k.window else "full_attention" for k in kinds],
        "sliding_window": windows.pop() if windows else context_tokens,  # its class wants a number
        "layer_rope_theta": [rope["rope_theta"] if kind.rotates else 0 for kind in kinds],
    }


def sink_names(kinds: Sequence[LayerKind]) -> list[str]:
    """Of the tensors that the sibling's class has in addition, each [query heads]."""
    if all(kind == LayerKind() for kind in kinds):
        return []
    return [f"model.layers.{index}.{SINKS}" for index in range(len(kinds))]
