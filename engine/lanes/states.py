"""Which modules keep a state of each sequence beside keys and values: read from their code.

A pass on the meta device would not show it: such a module runs over a packed row without an error,
and mixes its sequences.
"""

import inspect
import sys
from collections.abc import Iterator
from types import CodeType

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

# What a module asks a cache of transformers for where it keeps a state.
STATE_NAMES = frozenset(
    {
        "get_conv_state",
        "get_linear_cache",
        "get_recurrent_state",
        "has_previous_state",
        "set_linear_cache",
        "update_conv_state",
        "update_recurrent_state",
    }
)


def stateful_modules(model: PreTrainedModel) -> list[str]:
    """Paths of the innermost modules whose own `forward` keeps a state of its sequence."""
    found = [path for path, module in model.named_modules() if path and _keeps_state(type(module))]
    return [path for path in found if not any(other.startswith(f"{path}.") for other in found)]


def own_cache_class(model: PreTrainedModel) -> str | None:
    """The name of a class of caches, or of their layers, that the model's own files define."""
    kinds = (Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin)
    sources = {type(module).__module__ for module in model.modules()}
    for source in sorted(sources & sys.modules.keys()):
        for name, found in vars(sys.modules[source]).items():
            own = inspect.isclass(found) and found.__module__ == source
            if own and issubclass(found, kinds) and not name.startswith("Static"):
                return name
    return None


def _keeps_state(kind: type[torch.nn.Module]) -> bool:
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and not STATE_NAMES.isdisjoint(_names(code))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
