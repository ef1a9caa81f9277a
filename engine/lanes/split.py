"""Modules that keep a state of their sequence, run once for each sequence inside a packed pass.

Everything else of the pass stays packed. The state is what transformers' own cache keeps for such
a module; it belongs to the sequence as its keys and values do.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from moestro.engine.model import PackedCache, Span

from .states import stateful_modules


def split_stateful(model: PreTrainedModel, cache: PackedCache) -> list[str]:
    """Their paths; from now on each runs sequence by sequence over what `cache` has in its row."""
    paths = stateful_modules(model)
    for path in paths:
        module = model.get_submodule(path)
        make = partial(DynamicCache, config=model.config)
        module.__dict__["forward"] = SplitForward(module.forward, cache, make)
    return paths


class SplitForward:
    """In place of such a module's `forward`."""

    def __init__(
        self, stock: Callable[..., Any], cache: PackedCache, make_state: Callable[[], Any]
    ) -> None:
        self._stock, self._cache, self._make = stock, cache, make_state

    def __call__(self, *given: Any, **named: Any) -> Any:
        return _joined([self._run(span, given, named) for span in self._cache.spans])

    def _run(self, span: Span, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        own = [self._own(each, span) for each in given]
        return self._stock(*own, **{name: self._own(each, span) for name, each in named.items()})

    def _own(self, value: Any, span: Span) -> Any:
        """What of an argument is this sequence's: rows of [1, T, ...], the state for the cache."""
        if value is self._cache:
            if span.kv.state is None:
                span.kv.state = self._make()
            return span.kv.state
        if isinstance(value, tuple):
            return tuple(self._own(each, span) for each in value)
        packed = self._cache.spans[-1].start + self._cache.spans[-1].tokens
        if isinstance(value, torch.Tensor) and value.shape[:2] == (1, packed):
            return value[:, span.start : span.start + span.tokens]
        return value


def _joined(parts: list[Any]) -> Any:
    """The sequences' outputs [1, n, ...] in one row again."""
    if len(parts) == 1 or parts[0] is None:
        return parts[0]
    if isinstance(parts[0], tuple):
        return tuple(_joined(list(each)) for each in zip(*parts, strict=True))
    return torch.cat(parts, dim=1)
