"""Modules of a stock model that the library computes in one call, where it gives what they give.

A norm is replaced when its rows agree with the stock module's on random numbers. An attention
module is replaced for steps of single tokens, when it agreed with the stock one in a step that ran
both (`Thinner.compare`); whatever else comes to it (prompts, windows, sinks) goes the general way.
No family is named here: what agrees is replaced.

Shape letters: T tokens of the packed row, H width, D width of a head.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moestro.engine.kernels import (
    LANES,
    MOST_GROUP,
    AttentionWeights,
    Norm,
    Scratch,
    attend,
    normalize,
    tile_attention,
)
from moestro.engine.weights import TileLinear

from .kv import PackedCache

log = logging.getLogger("moestro.engine")

AGREE = 1e-5  # of the largest number: how far a replaced module may be from the stock one
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")


def agrees(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).abs().max() <= AGREE * wanted.abs().max().clamp(min=1e-30))


def norm_of(module: torch.nn.Module) -> Norm | None:
    """What `module` is, where it is an RMS norm over its last dimension."""
    weight = module._parameters.get("weight")
    eps = next(
        (getattr(module, name) for name in ("variance_epsilon", "eps") if name in module.__dict__),
        None,
    )
    plain = weight is not None and weight.dim() == 1 and weight.dtype == torch.float32
    if not plain or not isinstance(eps, float) or len(module._parameters) > 1:
        return None
    assert weight is not None
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((3, len(weight)), generator=generator) * torch.tensor([[0.01], [1], [50]])
    wanted = module(rows)
    for candidate in (weight.detach(), weight.detach() + 1):
        norm = Norm(candidate.contiguous(), eps)
        if wanted.shape == rows.shape and agrees(normalize(rows, norm), wanted):
            return norm
    return None


class ThinNorm:
    """In place of a norm's `forward`."""

    def __init__(self, norm: Norm) -> None:
        self.norm = norm

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1]).contiguous()
        return normalize(flat, self.norm).view(hidden.shape)


class ThinAttention:
    """In place of an attention module's `forward`."""

    def __init__(
        self, module: torch.nn.Module, cache: PackedCache, scratch: Scratch, norms: Any
    ) -> None:
        self._stock, self._cache, self._scratch = module.forward, cache, scratch
        self._module, self._norms = module, norms
        self._layer = int(module.layer_idx)  # type: ignore[arg-type]
        self._dim = int(module.head_dim)  # type: ignore[arg-type]
        self._weights: AttentionWeights | None = None
        self.comparing, self.trusted = False, False

    def __call__(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: object = None,
        past_key_values: object = None,
        **keywords: Any,
    ) -> Any:
        """[1, T, H] -> ([1, T, H], None)"""
        if (
            (self.trusted or self.comparing)
            and position_embeddings is not None
            and attention_mask is None
            and past_key_values is self._cache
            and self._cache.rows is not None
        ):
            found = self._attend(hidden_states, position_embeddings)
            if not self.comparing:
                return found, None
        else:
            found = None
        out = self._stock(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **keywords,
        )
        if self.comparing and found is not None:
            wanted = out[0] if isinstance(out, tuple) and len(out) == 2 else None
            self.trusted = wanted is not None and out[1] is None and agrees(found, wanted)
        return out

    def _attend(
        self, hidden: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        rows = self._cache.rows
        assert rows is not None
        cosines, sines = (each.reshape(-1, each.shape[-1]).contiguous() for each in turns)
        if self._weights is None:
            self._weights = self._found(cosines.shape[1])
        flat = hidden.reshape(-1, hidden.shape[-1]).contiguous()
        heads = self._weights.struct.key_heads
        like = flat.new_empty((heads, 0, self._dim))
        store = self._cache.spans[0].kv.store
        buffers = store.layer(self._layer, like, like)
        out = attend(self._weights, flat, (cosines, sines), buffers, rows, self._scratch)
        return out.view(1, *out.shape)

    def _found(self, rotary: int) -> AttentionWeights:
        parts = [getattr(self._module, name) for name in PROJECTIONS]
        projections = [(part.matrix, part.bias_row) for part in parts]
        heads, key_heads = (part.out_features // self._dim for part in parts[:2])
        shape = (heads, key_heads, self._dim, float(self._module.scaling))  # type: ignore[arg-type]
        return tile_attention(projections, self._norms, shape, rotary)


def attention_of(
    module: torch.nn.Module, cache: PackedCache, scratch: Scratch
) -> ThinAttention | None:
    """A candidate for `module`, where it is made of what the library's attention is made of."""
    children = dict(module.named_children())
    facts = ("layer_idx", "head_dim", "scaling")
    if not {*PROJECTIONS} <= children.keys() <= {*PROJECTIONS, *NORMS} or module._parameters:
        return None
    if not all(isinstance(children[name], TileLinear) for name in PROJECTIONS):
        return None
    if any(not isinstance(getattr(module, name, None), int | float) for name in facts):
        return None
    parts: list[Any] = [children[name] for name in PROJECTIONS]
    query, key, value, output = (part.matrix for part in parts)
    dim = int(module.head_dim)  # type: ignore[arg-type]
    fits = key.outputs == value.outputs and query.outputs == output.inputs
    if dim % LANES or not fits or query.outputs > MOST_GROUP * key.outputs:
        return None
    norms = [norm_of(children[name]) for name in NORMS if name in children]
    if None in norms or len(norms) == 1:
        return None
    if norms and norms[0].eps != norms[1].eps:  # type: ignore[union-attr]
        return None
    return ThinAttention(module, cache, scratch, tuple(norms) or None)


class Thinner:
    """All replacements of one model."""

    def __init__(self, model: torch.nn.Module, cache: PackedCache) -> None:
        """`model` has its weights. Norms are replaced at once."""
        scratch = Scratch()
        self.attentions = []
        with torch.inference_mode():
            for module in model.modules():
                if (found := attention_of(module, cache, scratch)) is not None:
                    module.__dict__["forward"] = found
                    self.attentions.append(found)
            norms = [(module, norm_of(module)) for module in model.modules()]
        self.norms = [(module, ThinNorm(norm)) for module, norm in norms if norm is not None]
        for module, thin in self.norms:
            module.__dict__["forward"] = thin

    @contextmanager
    def compare(self) -> Iterator[None]:
        """Steps of single tokens inside run both ways; who agrees is trusted from then on."""
        for each in self.attentions:
            each.comparing = True
        try:
            yield
        finally:
            for each in self.attentions:
                each.comparing = False
            trusted = sum(each.trusted for each in self.attentions)
            log.info(
                "one call each: %d norms, attention of %d layers (of %d that look like it)",
                len(self.norms),
                trusted,
                len(self.attentions),
            )
