"""Families with Llama's tensors: as they are, or with other configurations around them."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .family import LayerKind, Part, Parts, all_as_they_are, layer_prefixes

ACTIVATIONS = ("silu",)


@dataclass(frozen=True, slots=True)
class Llama:
    """Pre-norm RMSNorm, rotary positions on whole heads, a gated FFN without biases."""

    title: str
    activations: tuple[str, ...] = ACTIVATIONS

    def obstacles(self, config: Any) -> Iterator[str]:
        if config.hidden_act not in self.activations:
            carried = " and ".join(self.activations)
            yield f"its hidden_act is {config.hidden_act!r}; only {carried} is carried"
        if getattr(config, "mlp_bias", False):
            yield "mlp_bias is set; experts have no bias"
        partial = (config.rope_parameters or {}).get("partial_rotary_factor") or 1.0
        if partial != 1.0:
            yield "it rotates a part of each head; the twin rotates whole heads"
        if not any(kind.window for kind in self.layers(config)) and (
            getattr(config, "sliding_window", None) is not None
            and not hasattr(config, "layer_types")
        ):
            yield "it has a sliding_window that its class does not know; remove it"

    def layers(self, config: Any) -> list[LayerKind]:
        return [LayerKind()] * int(config.num_hidden_layers)

    def told_by_twin(self, config: Any) -> bool:
        return all(kind == LayerKind() for kind in self.layers(config))

    def twin_fields(self, config: Any) -> dict[str, Any]:
        return {}

    def twin_parts(self, names: Collection[str], config: Any) -> Parts:
        return all_as_they_are(names)

    def dense_parts(self, names: Collection[str], config: Any) -> Parts:
        return all_as_they_are(names)

    def gate_of(self, mlp: Any) -> torch.Tensor:
        weight: torch.Tensor = mlp.gate_proj.weight
        return weight


@dataclass(frozen=True, slots=True)
class Windowed(Llama):
    """All layers, or those that `layer_types` names, see `sliding_window` tokens."""

    def layers(self, config: Any) -> list[LayerKind]:
        count = int(config.num_hidden_layers)
        types = getattr(config, "layer_types", None) or ["sliding_attention"] * count
        width = getattr(config, "sliding_window", None)
        windows = [width if t == "sliding_attention" else None for t in types]
        rotates = getattr(config, "no_rope_layers", None) or [1] * count
        return [LayerKind(w, bool(r)) for w, r in zip(windows, rotates, strict=True)]


@dataclass(frozen=True, slots=True)
class InputBiased(Windowed):
    """Biases of q, k and v, none of o: the twin's o gets one of zeros."""

    def told_by_twin(self, config: Any) -> bool:
        return False

    def twin_fields(self, config: Any) -> dict[str, Any]:
        return {"attention_bias": bool(getattr(config, "attention_bias", True))}

    def twin_parts(self, names: Collection[str], config: Any) -> Parts:
        return all_as_they_are(names) | {
            name: Part((source,), _zeros) for name, source in self._added(names).items()
        }

    def dense_parts(self, names: Collection[str], config: Any) -> Parts:
        if getattr(config, "attention_out_bias", False):
            return all_as_they_are(names)
        return all_as_they_are([n for n in names if not n.endswith(".o_proj.bias")])

    def _added(self, names: Collection[str]) -> dict[str, str]:
        attention = [f"{prefix}self_attn." for prefix in layer_prefixes(names)]
        return {
            f"{a}o_proj.bias": f"{a}o_proj.weight"
            for a in attention
            if f"{a}q_proj.bias" in names and f"{a}o_proj.bias" not in names
        }


@dataclass(frozen=True, slots=True)
class Granite(Llama):
    """Llama with factors of its own at embeddings, attention, residuals and logits."""

    def told_by_twin(self, config: Any) -> bool:
        return False

    def twin_fields(self, config: Any) -> dict[str, Any]:
        factors = ("embedding", "residual", "attention")
        names = ["logits_scaling", *(f"{factor}_multiplier" for factor in factors)]
        return {name: getattr(config, name) for name in names}


def _zeros(tensors: Any) -> torch.Tensor:
    return torch.zeros(tensors[0].shape[0], dtype=tensors[0].dtype)
