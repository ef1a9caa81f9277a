"""Modules of a stock model that the library computes in one call, where it gives what they give.

A norm, a router or a gated MLP is replaced when it agrees with the stock module on random rows. An
attention module is replaced for steps of single tokens, and for prompts, when it agreed with the
stock one in a step of each that ran both (thinner.py); windows and sinks go the general way. No
family is named here: what agrees is replaced.

Shape letters: T tokens of the packed row, H width, D width of a head.
"""

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

import torch

from moestro.engine.kernels import (
    LANES,
    MOST_GROUP,
    Activation,
    AttentionWeights,
    ExpertTable,
    Norm,
    Routed,
    Router,
    Scratch,
    TileExpert,
    attend,
    attend_prompt,
    attend_stored,
    attends_prompts,
    known_activation,
    linear,
    multiply_experts,
    normalize,
    place,
    route,
    tile_attention,
)
from moestro.engine.weights import TileLinear, beside

from .kv import PackedCache

AGREE = 1e-5  # of the largest number: how far a replaced module may be from the stock one
AGREE_COARSE = 1e-2  # with integer weights: a last digit can turn an activation's rounding
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")


def agrees(found: torch.Tensor, wanted: torch.Tensor, *, coarse: bool = False) -> bool:
    most = AGREE_COARSE if coarse else AGREE
    return bool((found - wanted).abs().max() <= most * wanted.abs().max().clamp(min=1e-30))


def takes_rows(module: torch.nn.Module) -> bool:
    """Rows are all that it has to be called with."""
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    given = [each for each in signature(module.forward).parameters.values() if each.kind in kinds]
    return bool(given) and all(each.default is not Parameter.empty for each in given[1:])


def norm_of(module: torch.nn.Module) -> Norm | None:
    """What `module` is, where it is an RMS norm over its last dimension."""
    weight = module._parameters.get("weight")
    eps = next(
        (getattr(module, name) for name in ("variance_epsilon", "eps") if name in module.__dict__),
        None,
    )
    plain = weight is not None and weight.dim() == 1 and weight.dtype == torch.float32
    bare = len(module._parameters) == 1 and takes_rows(module)
    if not plain or not isinstance(eps, float) or not bare:
        return None
    assert weight is not None
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((3, len(weight)), generator=generator) * torch.tensor([[0.01], [1], [50]])
    try:
        wanted = module(rows)
    except (
        AttributeError,
        TypeError,
    ):  # its other arguments only look as if they could be left out
        return None
    for candidate in (weight.detach(), weight.detach() + 1):
        norm = Norm(candidate.contiguous(), eps)
        if wanted.shape == rows.shape and agrees(normalize(rows, norm), wanted):
            return norm
    return None


def fits(*tensors: object) -> bool:
    """The library reads such: fp32 on the host."""
    for each in tensors:
        if not isinstance(each, torch.Tensor) or each.dtype != torch.float32 or not each.is_cpu:
            return False
    return True


def are_turns(given: object) -> bool:
    """Cosines and sines, not another family's way to say positions."""
    return isinstance(given, tuple) and len(given) == 2 and fits(*given)


class ThinNorm:
    """In place of a norm's `forward`."""

    def __init__(self, stock: Callable[..., Any], norm: Norm) -> None:
        self._stock, self.norm = stock, norm

    def __call__(self, hidden: torch.Tensor, *others: Any, **keywords: Any) -> Any:
        if others or keywords or not fits(hidden):
            return self._stock(hidden, *others, **keywords)
        flat = hidden.reshape(-1, hidden.shape[-1]).contiguous()
        return normalize(flat, self.norm).view(hidden.shape)


class ThinRouter:
    """In place of the `forward` of a router by softmax."""

    def __init__(self, stock: Callable[..., Any], router: Router) -> None:
        self._stock, self.router = stock, router

    def __call__(self, hidden: torch.Tensor, *others: Any, **keywords: Any) -> Any:
        flat = hidden.reshape(-1, hidden.shape[-1])
        if others or keywords or not fits(flat):
            return self._stock(hidden, *others, **keywords)
        return route(flat.contiguous(), self.router)


def router_of(module: torch.nn.Module) -> ThinRouter | None:
    """What `module` is, where it gives (logits, shares, experts) by the softmax of one product."""
    parameters, k = module._parameters, getattr(module, "top_k", None)
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if not isinstance(k, int) or weight is None or weight.dim() != 2 or list(module.children()):
        return None
    if any(each is not None and each.dtype != torch.float32 for each in parameters.values()):
        return None
    if not takes_rows(module):
        return None
    rows = torch.randn((4, weight.shape[1]), generator=torch.Generator().manual_seed(0))
    try:
        wanted = module(rows)
    except (AttributeError, TypeError):  # its other arguments only look optional
        return None
    if not isinstance(wanted, tuple) or len(wanted) != 3:
        return None
    for normalized in (False, True):
        router = Router(
            weight.detach().contiguous(), None if bias is None else bias.detach(), k, normalized
        )
        found = route(rows, router)
        same = all(a.shape == b.shape for a, b in zip(found, wanted, strict=True))
        if same and torch.equal(found[2], wanted[2]) and all(map(agrees, found[:2], wanted[:2])):
            return ThinRouter(module.forward, router)
    return None


class ThinMlp:
    """In place of the `forward` of an MLP with a gate, as one expert that every row goes to."""

    def __init__(
        self,
        stock: Callable[..., Any],
        expert: TileExpert,
        activation: Activation,
        scratch: Scratch,
    ) -> None:
        self._stock, self.scratch = stock, scratch
        self.expert, self.activation = expert, activation
        self._table = ExpertTable([expert])

    def __call__(self, hidden: torch.Tensor) -> Any:
        if not fits(hidden):
            return self._stock(hidden)
        flat = hidden.reshape(-1, hidden.shape[-1]).contiguous()
        rows = flat.shape[0]
        if rows == 1:
            routed = Routed.of_one_token(1)
        else:
            routed = Routed((0, rows), range(rows), range(rows))
        out = torch.empty((rows, self.expert.down.outputs))
        multiply_experts(self._table, routed, flat, out, self.activation, self.scratch)
        return out.view(*hidden.shape[:-1], out.shape[1])


def mlp_of(module: torch.nn.Module, scratch: Scratch) -> ThinMlp | None:
    """What `module` is, where it is down(act(gate(x)) * up(x)) in tiles, without biases."""
    children: dict[str, Any] = dict(module.named_children())
    linears = {name: child for name, child in children.items() if isinstance(child, TileLinear)}
    act = getattr(module, "act_fn", getattr(module, "activation", None))
    if (
        module._parameters
        or not callable(act)
        or any(child.bias_row is not None for child in linears.values())
    ):
        return None
    if linears.keys() == {"input_linear", "output_linear"}:
        first, down = linears["input_linear"].matrix, linears["output_linear"].matrix
    elif linears.keys() == {"gate_proj", "up_proj", "down_proj"}:
        gate, up, last = (linears[name] for name in ("gate_proj", "up_proj", "down_proj"))
        if gate.form != up.form or gate.out_features != up.out_features or gate.out_features % 16:
            return None
        first, down = beside(gate, up), last.matrix
    else:
        return None

    def gated(inner: torch.Tensor) -> torch.Tensor:
        gates, ups = inner.chunk(2, dim=-1)
        return act(gates) * ups  # type: ignore[no-any-return]

    known = known_activation(gated, first.outputs, 0.0, 0.0)
    if known is None or down.inputs * 2 != first.outputs:
        return None
    thin = ThinMlp(module.forward, TileExpert.of(first, None, down, None), known, scratch)
    rows = torch.randn((3, first.inputs), generator=torch.Generator().manual_seed(0))
    coarse = any(not child.form.is_float for child in linears.values())
    return thin if agrees(thin(rows), module(rows), coarse=coarse) else None


def flat_turns(turns: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of a pass, [T, R]."""
    cosines, sines = (each.reshape(-1, each.shape[-1]).contiguous() for each in turns)
    return cosines, sines


class ThinAttention:
    """In place of an attention module's `forward`."""

    def __init__(
        self, module: torch.nn.Module, cache: PackedCache, scratch: Scratch, norms: Any
    ) -> None:
        self._stock, self._cache, self._scratch = module.forward, cache, scratch
        self._module, self._norms = module, norms
        self.layer = int(module.layer_idx)  # type: ignore[arg-type]
        self._dim = int(module.head_dim)  # type: ignore[arg-type]
        self._weights: AttentionWeights | None = None
        self.comparing, self.trusted, self.takes_prompts = False, False, False

    def __call__(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: object = None,
        past_key_values: object = None,
        **keywords: Any,
    ) -> Any:
        """[1, T, H] -> ([1, T, H], None)"""
        found = None
        if (
            are_turns(position_embeddings)
            and attention_mask is None
            and fits(hidden_states)
            and past_key_values is self._cache
        ):
            found = self._attend(hidden_states, position_embeddings)  # type: ignore[arg-type]
        if found is not None and not self.comparing:
            return found, None
        out = self._stock(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **keywords,
        )
        if self.comparing and found is not None:
            wanted = out[0] if isinstance(out, tuple) and len(out) == 2 else None
            coarse = not self.is_float
            agreed = wanted is not None and agrees(found, wanted, coarse=coarse)
            if self._cache.rows is not None:
                self.trusted = agreed
            else:
                self.takes_prompts = agreed
        return out

    def _attend(
        self, hidden: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor | None:
        """None in a pass for which it is not trusted."""
        rows, placed = self._cache.rows, self._cache.placed
        trusted = self.trusted if rows is not None else self.takes_prompts
        if not (trusted or self.comparing) or (rows is None and placed is None):
            return None
        buffers = self.buffers()
        if rows is None and not attends_prompts(*buffers, buffers[0]):
            return None
        cosines, sines = flat_turns(turns)
        flat = hidden.reshape(-1, hidden.shape[-1]).contiguous()
        weights = self.weights(cosines.shape[1])
        event = (weights, flat, (cosines, sines), buffers)
        if rows is not None:
            return attend(*event, rows, self._scratch)[None]
        assert placed is not None
        mixed = self._mixed(place(*event, placed, self._scratch), buffers)
        output = self._module.o_proj
        return linear(mixed, output.matrix, output.bias_row, self._scratch)[None]  # type: ignore[union-attr,arg-type]

    def _mixed(
        self, queries: torch.Tensor, buffers: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """[T, heads, D], whose keys and values are stored -> what they attend to [T, heads * D]."""
        singles, mixed = self._cache.singles, torch.empty_like(queries)
        if singles is not None:  # by the code of steps that have no others
            mixed[singles.at] = attend_stored(queries[singles.at], buffers, singles.rows)
        for span in self._cache.spans:
            if span.tokens > 1:
                new = slice(span.start, span.start + span.tokens)
                keys, values = span.kv.read(self.layer, span.tokens)
                attend_prompt(queries[new].transpose(0, 1), keys, values, 1.0, mixed[new])
        return mixed.flatten(1)

    @property
    def is_float(self) -> bool:
        """Its weights are multiplied with as floats."""
        return bool(self._module.q_proj.form.is_float)  # type: ignore[union-attr]

    def buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [heads, rows, D] of this layer."""
        store = self._cache.spans[0].kv.store
        if self.layer in store.layers:
            return store.layers[self.layer]
        like = torch.empty((self._module.k_proj.out_features // self._dim, 0, self._dim))  # type: ignore[union-attr,operator,arg-type]
        return store.layer(self.layer, like, like)

    def weights(self, rotary: int) -> AttentionWeights:
        """With so many inputs of a head that turn."""
        if self._weights is None:
            self._weights = self._found(rotary)
        return self._weights

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
    widths = zip(norms, (query.outputs, key.outputs), strict=False)
    if any(width % len(norm.weight) for norm, width in widths if norm is not None):
        return None
    return ThinAttention(module, cache, scratch, tuple(norms) or None)
