"""Families whose tensors are stored in another form than Llama's: fused, shifted, or centred."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .family import Part, Parts, all_as_they_are, as_it_is, layer_prefixes
from .llama import Llama, Windowed

NORMS = ("input_layernorm", "post_attention_layernorm")
LAST_NORM = "model.norm.weight"
OLMO_EPS = 1e-5  # in its class, not in its configuration


@dataclass(frozen=True, slots=True)
class Gemma(Llama):
    """Norms multiply with 1 + weight, embeddings with the root of H, the FFN's gate is a GELU.

    Gemma (arXiv 2403.08295).
    """

    activations: tuple[str, ...] = ("gelu_pytorch_tanh", "gelu")

    def obstacles(self, config: Any) -> Iterator[str]:
        yield from Llama.obstacles(self, config)
        if getattr(config, "use_bidirectional_attention", None):
            yield "it looks ahead (use_bidirectional_attention); the twin does not"

    def told_by_twin(self, config: Any) -> bool:
        return False

    def twin_fields(self, config: Any) -> dict[str, Any]:
        return {"embedding_multiplier": float(config.hidden_size**0.5)}

    def twin_parts(self, names: Collection[str], config: Any) -> Parts:
        return _norms_changed(names, lambda tensors: tensors[0].float() + 1.0)

    def dense_parts(self, names: Collection[str], config: Any) -> Parts:
        return _norms_changed(names, lambda tensors: tensors[0].float() - 1.0)


@dataclass(frozen=True, slots=True)
class Phi3(Windowed):
    """One matrix of q, k and v, one of gate and up. Phi-3 (arXiv 2404.14219)."""

    def obstacles(self, config: Any) -> Iterator[str]:
        yield from Windowed.obstacles(self, config)
        if (config.rope_parameters or {}).get("rope_type", "default") != "default":
            yield "its rope changes with the length of the text (longrope); the twin's does not"

    def told_by_twin(self, config: Any) -> bool:
        return False

    def twin_fields(self, config: Any) -> dict[str, Any]:
        rope = {n: v for n, v in config.rope_parameters.items() if n != "partial_rotary_factor"}
        return {"rope_parameters": rope}

    def twin_parts(self, names: Collection[str], config: Any) -> Parts:
        parts = all_as_they_are([n for n in names if not _is_fused(n)])
        for prefix in layer_prefixes(names):
            fused = f"{prefix}self_attn.qkv_proj.weight"
            for name, rows in zip("qkv", _qkv_rows(config), strict=True):
                parts[f"{prefix}self_attn.{name}_proj.weight"] = Part((fused,), _Rows(*rows))
            fused, size = f"{prefix}mlp.gate_up_proj.weight", int(config.intermediate_size)
            parts[f"{prefix}mlp.gate_proj.weight"] = Part((fused,), _Rows(0, size))
            parts[f"{prefix}mlp.up_proj.weight"] = Part((fused,), _Rows(size, 2 * size))
        return parts

    def dense_parts(self, names: Collection[str], config: Any) -> Parts:
        parts = all_as_they_are([n for n in names if not _is_split(n)])
        for prefix in layer_prefixes(names):
            qkv = tuple(f"{prefix}self_attn.{name}_proj.weight" for name in "qkv")
            parts[f"{prefix}self_attn.qkv_proj.weight"] = Part(qkv, _joined)
            two = tuple(f"{prefix}mlp.{name}_proj.weight" for name in ("gate", "up"))
            parts[f"{prefix}mlp.gate_up_proj.weight"] = Part(two, _joined)
        return parts

    def gate_of(self, mlp: Any) -> torch.Tensor:
        weight: torch.Tensor = mlp.gate_up_proj.weight
        return weight[: len(weight) // 2]


@dataclass(frozen=True, slots=True)
class Olmo(Llama):
    """LayerNorm without weights is RMSNorm of what has a mean of 0 (SliceGPT, arXiv 2401.15024).

    So the mean over H is taken out of everything that writes into the residual. OLMo (arXiv
    2402.00838).
    """

    def obstacles(self, config: Any) -> Iterator[str]:
        yield from Llama.obstacles(self, config)
        if config.clip_qkv is not None:
            yield "it clips queries, keys and values (clip_qkv); the twin does not"

    def told_by_twin(self, config: Any) -> bool:
        return False

    def twin_fields(self, config: Any) -> dict[str, Any]:
        return {"rms_norm_eps": OLMO_EPS}

    def twin_parts(self, names: Collection[str], config: Any) -> Parts:
        parts = all_as_they_are(names)
        embedding = "model.embed_tokens.weight"
        parts[embedding] = Part((embedding,), _centred_rows, rounds=True)
        for prefix in layer_prefixes(names):
            for name in (f"{prefix}self_attn.o_proj", f"{prefix}mlp.down_proj"):
                for kind in ("weight", "bias"):
                    if f"{name}.{kind}" in names:
                        parts[f"{name}.{kind}"] = Part((f"{name}.{kind}",), _centred, rounds=True)
        for name in _norm_names(names):
            parts[name] = Part((), _Ones(int(config.hidden_size)))
        return parts

    def dense_parts(self, names: Collection[str], config: Any) -> Parts:
        """The weights stay centred: the model is the same."""
        norms = _norm_names(names)
        return all_as_they_are([n for n in names if n not in norms])


@dataclass(frozen=True, slots=True)
class _Rows:
    first: int
    end: int

    def __call__(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return tensors[0][self.first : self.end]


@dataclass(frozen=True, slots=True)
class _Ones:
    width: int

    def __call__(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.ones(self.width)


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(tensors))


def _centred(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """[H, …] less its mean over H."""
    exact = tensors[0].double()
    return (exact - exact.mean(dim=0, keepdim=True)).float()


def _centred_rows(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """[…, H] less its mean over H."""
    exact = tensors[0].double()
    return (exact - exact.mean(dim=-1, keepdim=True)).float()


def _norm_names(names: Collection[str]) -> set[str]:
    inside = [f"{p}{norm}.weight" for p in layer_prefixes(names) for norm in NORMS]
    return {LAST_NORM, *inside}


def _norms_changed(names: Collection[str], make: Any) -> Parts:
    norms = _norm_names(names)
    return {n: Part((n,), make, rounds=True) if n in norms else as_it_is(n) for n in names}


def _qkv_rows(config: Any) -> list[tuple[int, int]]:
    own = getattr(config, "head_dim", None)
    head = int(own or config.hidden_size // config.num_attention_heads)
    q = head * int(config.num_attention_heads)
    k = q + head * int(config.num_key_value_heads)
    return [(0, q), (q, k), (k, 2 * k - q)]


def _is_fused(name: str) -> bool:
    return name.endswith((".qkv_proj.weight", ".gate_up_proj.weight"))


def _is_split(name: str) -> bool:
    split = ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")
    return name.endswith(tuple(f".{part}_proj.weight" for part in split))
