"""Attention over a packed row, plugged into stock transformers as the implementation "moestro".

Every sequence of the row attends to its own stored rows alone. Masks are the model's own: the mask
hook hands the model's `mask_function` on as a rule, and the rule is evaluated in the sequence's
own positions. Where the rule is plain causality there is none, and the fast path runs.

Shape letters: T tokens of the packed row, n new tokens of one sequence, S all its tokens,
H query heads, G query heads per key head, D head width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import causal_mask_function

from moestro.engine.kernels import attend_prompt, attend_stored, attends_prompts

from .kv import PackedCache, Span

NAME = "moestro"
SINK_BLOCK_BYTES = 8 << 20  # of scores at a time, where they have to be written out: of a cache
GPU_SINK_BLOCK_BYTES = 256 << 20  # there each block costs a dozen launches
WIDEST_FLASH_HEAD = 256  # numbers; the kernel that takes grouped heads takes no wider ones
# Keywords that arrive at an attention function and change nothing here: the mask rule already
# holds the window, the rest is bookkeeping of the caller.
HARMLESS = frozenset(
    {
        "cache_position",
        "is_causal",
        "output_attentions",
        "output_router_logits",
        "position_ids",
        "sliding_window",
        "use_cache",
    }
)


class MaskRule:
    """A model's mask as a function of (batch, head, query position, key position)."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def evaluate(self, start: int, new_tokens: int, device: torch.device) -> torch.Tensor:
        """Boolean [n, S]: True where query `start + i` may see key j."""
        zero = torch.zeros((), dtype=torch.long, device=device)
        queries = torch.arange(start, start + new_tokens, device=device)[:, None]
        keys = torch.arange(start + new_tokens, device=device)[None]
        mask: torch.Tensor = self.function(zero, zero, queries, keys)
        return mask.expand(new_tokens, start + new_tokens)


def mask_hook(
    *_: object,
    mask_function: Callable[..., Any] | None = None,
    config: Any = None,
    device: torch.device = torch.device("cpu"),  # noqa: B008  # a value like any other
    **__: object,
) -> Any:
    """What transformers calls for a mask: None for plain causality, else the model's own rule.

    For a model that reads its masks, a tensor: bool [1, 1, T, sum S], each sequence a block.
    """
    cache: PackedCache | None = config.__dict__.get("moestro_cache") if config is not None else None
    if cache is not None and cache.block_masks:
        return _blocks(cache, MaskRule(mask_function or causal_mask_function), device)
    if mask_function is None or mask_function is causal_mask_function:
        return None
    return MaskRule(mask_function)


def _blocks(cache: PackedCache, rule: MaskRule, device: torch.device) -> torch.Tensor:
    lengths = [span.kv.length_tokens + span.tokens for span in cache.spans]
    tokens = cache.spans[-1].start + cache.spans[-1].tokens
    found = torch.zeros((1, 1, tokens, sum(lengths)), dtype=torch.bool, device=device)
    behind = 0
    for span, length in zip(cache.spans, lengths, strict=True):
        rows = slice(span.start, span.start + span.tokens)
        block = rule.evaluate(span.kv.length_tokens, span.tokens, device)
        found[0, 0, rows, behind : behind + length] = block
        behind += length
    return found


class UnknownKeyword(Exception):
    """The model's attention wants something that this implementation does not do."""


def attention_hook(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: MaskRule | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    s_aux: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    **keywords: object,
) -> tuple[torch.Tensor, None]:
    """`query` [1, H, T, D] -> ([1, T, H, D], None). Raises UnknownKeyword by name."""
    cache: PackedCache = module.moestro_cache  # type: ignore[assignment]  # set by `install`
    _refuse_unknown(cache, attention_mask, indices, keywords)
    cache.ruled |= isinstance(attention_mask, MaskRule)  # found while tracing, as below
    layer, returned = cache.written
    direct = key is returned
    if not direct and returned is not None:
        cache.expanded_layers.add(layer)  # found while tracing, on the meta device
    done = None
    if layer in cache.attended_by_library and attention_mask is None:
        done = _attend_singles(cache, layer, query, scaling)
    outputs, offset = [], 0
    for index, span in enumerate(cache.spans):
        length = span.kv.length_tokens + span.tokens
        if direct:
            keys, values = span.kv.read(layer, span.tokens)  # [Hk, S, D]
        else:
            keys, values = (
                key[0, :, offset : offset + length],
                value[0, :, offset : offset + length],
            )
        behind, offset = offset, offset + length
        if done is not None and span.tokens == 1:
            outputs.append(done.pop(0))
            continue
        rows = query[:, :, span.start : span.start + span.tokens]  # [1, H, n, D]
        if attention_mask is None and s_aux is None:
            found = _attend_by_library(rows, keys, values, scaling)
            if found is not None:
                outputs.append(found)
                continue
        mask: torch.Tensor | None
        if isinstance(attention_mask, torch.Tensor):
            mask = _block(attention_mask, indices, span, slice(behind, offset))
        elif (first := _first_seen(cache, attention_mask, index, span, rows.device)) is not None:
            keys, values, mask = keys[:, first:], values[:, first:], None
        else:
            mask = _mask(cache, attention_mask, index, span, rows.device)
        if s_aux is not None:
            outputs.append(_attend_with_sinks(rows, keys, values, mask, scaling, s_aux))
        else:
            grouped = cache.grouped_heads
            outputs.append(_attend(rows, keys, values, mask, scaling, grouped=grouped))
    packed = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return packed.transpose(1, 2).contiguous(), None


def _refuse_unknown(
    cache: PackedCache,
    mask: MaskRule | torch.Tensor | None,
    indices: torch.Tensor | None,
    keywords: dict[str, object],
) -> None:
    for name, given in keywords.items():
        if given is not None and name not in HARMLESS:
            raise UnknownKeyword(f"attention keyword {name!r}")
    in_blocks = cache.block_masks and isinstance(mask, torch.Tensor)
    if mask is not None and not isinstance(mask, MaskRule) and not in_blocks:
        raise UnknownKeyword(f"an attention mask of type {type(mask).__name__}")
    if indices is not None and not in_blocks:
        raise UnknownKeyword("attention keyword 'indices'")


def _block(
    masks: torch.Tensor, indices: torch.Tensor | None, span: Span, keys: slice
) -> torch.Tensor:
    """Bool [n, S]: what `masks` [1, 1, T, sum S] lets a sequence's new tokens see.

    Of that, where there are `indices` [1, T, k] of the whole row's keys, those.
    """
    rows = slice(span.start, span.start + span.tokens)
    seen = masks[0, 0, rows]
    if indices is not None:
        chosen = torch.zeros_like(seen).scatter_(1, indices[0, rows].long(), True)
        seen = seen & chosen
    return seen[:, keys]


def _mask(
    cache: PackedCache, rule: MaskRule | None, index: int, span: Span, device: torch.device
) -> torch.Tensor | None:
    """None: every new token is one row that sees all, or plain causality.

    On a CPU, of prompts from position 0 alone; a GPU's kernels know that of their later parts, too.
    """
    start = span.kv.length_tokens
    if rule is None and (span.tokens == 1 or start == 0 or device.type != "cpu"):
        return None
    key = (id(rule) if rule is not None else 0, index)
    if key not in cache.masks:
        causal = rule or MaskRule(causal_mask_function)
        cache.masks[key] = causal.evaluate(start, span.tokens, device)
    return cache.masks[key]


def _first_seen(
    cache: PackedCache, rule: MaskRule | None, index: int, span: Span, device: torch.device
) -> int | None:
    """On a GPU, where one new token sees all keys from one on: which, in this pass.

    Then no mask is needed, which would make kernels want a copy of all keys for each head. Told on
    the host, for the device is not to be waited for.
    """
    if rule is None or span.tokens != 1 or device.type == "cpu":
        return None
    key = (id(rule), index)
    if key not in cache.first_seen:
        seen = rule.evaluate(span.kv.length_tokens, 1, torch.device("cpu"))[0]
        first = len(seen) - int(seen.sum())
        cache.first_seen[key] = first if bool(seen[first:].all()) else None
    return cache.first_seen[key]


def _attend_singles(
    cache: PackedCache, layer: int, query: torch.Tensor, scaling: float | None
) -> list[torch.Tensor] | None:
    """[1, H, 1, D] of each sequence with one new token, by the code of steps that have no others.

    So what a prompt beside them changes is not even their rounding.
    """
    if cache.singles is None:
        return None
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    rows = query[0].transpose(0, 1)[cache.singles.at] * scale  # [n, H, D]
    found = attend_stored(rows.contiguous(), cache.singles.store.layers[layer], cache.singles.rows)
    return list(found[:, None, :, None].unbind())


def _attend_by_library(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None
) -> torch.Tensor | None:
    """As `_attend` without a mask, of a prompt on the CPU; None: the library takes no such."""
    if rows.shape[2] == 1 or not attends_prompts(rows[0], keys, values):
        return None
    scale = scaling if scaling is not None else rows.shape[-1] ** -0.5
    return attend_prompt(rows[0], keys, values, scale).transpose(0, 1)[None]


def _attend(
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    *,
    grouped: bool = True,
) -> torch.Tensor:
    """[1, H, n, D] x [Hk, S, D] -> [1, H, n, Dv]. Without a mask, new tokens are the last ones.

    `grouped`: the device's kernels take key heads that query heads share.
    """
    heads, new_tokens, length = rows.shape[1], rows.shape[2], keys.shape[1]
    if new_tokens == 1 and mask is None:
        # one row per head: the G heads that share a key head become its rows, no copy of K or V
        shared = rows.reshape(1, keys.shape[0], heads // keys.shape[0], rows.shape[3])
        out = F.scaled_dot_product_attention(shared, keys[None], values[None], scale=scaling)
        return out.reshape(1, heads, 1, values.shape[2])
    flash = grouped and rows.shape[3] == values.shape[2] <= WIDEST_FLASH_HEAD
    if rows.device.type != "cpu" and (mask is not None or not flash):
        # Flash alone takes grouped heads there, and no mask: what takes both writes out all scores.
        # `_workspace_bytes` counts these copies.
        keys, values = for_every_head(keys, heads), for_every_head(values, heads)
    continues = mask is None and new_tokens < length
    seen: Any = causal_lower_right(new_tokens, length) if continues else mask
    return F.scaled_dot_product_attention(
        rows,
        keys[None],
        values[None],
        attn_mask=seen,
        is_causal=seen is None,
        scale=scaling,
        enable_gqa=heads != keys.shape[0],
    )


def for_every_head(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """[Hk, S, D] -> [H, S, D], each key head as often as query heads share it."""
    if rows.shape[0] == heads:
        return rows
    return rows.repeat_interleave(heads // rows.shape[0], dim=0)


def _attend_with_sinks(
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """As `_attend`, with one learned logit per head [H] that takes part in the softmax only.

    In blocks of query rows: the scores are written out, and would otherwise grow with n * S.
    """
    heads, new_tokens, length = rows.shape[1], rows.shape[2], keys.shape[1]
    if mask is None and new_tokens > 1:
        causal = MaskRule(causal_mask_function)
        mask = causal.evaluate(length - new_tokens, new_tokens, rows.device)
    scale = scaling if scaling is not None else rows.shape[-1] ** -0.5
    sink = sinks.float().view(keys.shape[0], -1, 1, 1)  # [Hk, G, 1, 1]
    block_bytes = SINK_BLOCK_BYTES if rows.device.type == "cpu" else GPU_SINK_BLOCK_BYTES
    step = max(1, block_bytes // (4 * heads * length))
    blocks = []
    for start in range(0, new_tokens, step):
        part = rows[0, :, start : start + step] * scale  # [H, b, D]
        grouped = part.reshape(keys.shape[0], -1, *part.shape[1:])  # [Hk, G, b, D]
        scores = (grouped @ keys[:, None].transpose(2, 3)).float()  # [Hk, G, b, S]
        if mask is not None:
            scores.masked_fill_(~mask[start : start + step], float("-inf"))
        top = torch.maximum(scores.amax(-1, keepdim=True), sink)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True) + (sink - top).exp()
        out = (weights.to(values.dtype) @ values[:, None]) / total
        blocks.append(out.reshape(1, heads, -1, values.shape[2]).to(rows.dtype))
    return torch.cat(blocks, dim=2)


def register() -> None:
    """Make the name "moestro" known to transformers, for attention and for its mask."""
    AttentionInterface.register(NAME, attention_hook)
    AttentionMaskInterface.register(NAME, mask_hook)


def install(model: torch.nn.Module, cache: PackedCache) -> None:
    """Let every module of `model` find the cache of its own engine."""
    for module in model.modules():
        module.__dict__["moestro_cache"] = cache
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            config.__dict__["moestro_cache"] = cache
