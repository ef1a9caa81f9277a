"""One sequence after the other, each with the cache that the model's own class makes for it.

For models whose attention keeps more than keys and values, or wants them where no other sequence
is. The experts are the same offloaded ones; a step of several sequences leases them for each.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from .lane import Key, LanePart
from .packed import arguments_of, head_rows, rows_kept


class SequentialLane:
    """A pass of one sequence at a time."""

    packs = False
    keeps_states = True

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._caches: dict[Key, Any] = {}

    @property
    def held_sequences(self) -> int:
        return len(self._caches)

    def run(self, parts: Sequence[LanePart], keep: Sequence[int]) -> torch.Tensor:
        (part,) = parts
        logits, self._caches[part.key] = run_one(
            self.model, self._caches.get(part.key), part.ids, part.start, keep
        )
        return logits

    def fork(self, key: Key, twins: Sequence[tuple[Key, Sequence[int]]]) -> None:
        for twin, _ in twins:
            self._caches[twin] = copy.deepcopy(self._caches[key])

    def forget(self, key: Key) -> None:
        self._caches.pop(key, None)

    def give_back(self, pages: Sequence[int]) -> None:
        """Pages are only counted here: what sequences that are gone have held is free."""


def run_one(
    model: PreTrainedModel, cache: Any, ids: list[int], start: int, keep: Sequence[int]
) -> tuple[torch.Tensor, Any]:
    """Logits [len(keep), V], fp32, and the cache after it; with None the model makes one."""
    device, taken = model.device, arguments_of(type(model).forward)
    given: dict[str, Any] = dict(head_rows(model, keep))
    if "position_ids" in taken:
        given["position_ids"] = torch.arange(start, start + len(ids), device=device)[None]
    output = model(
        input_ids=torch.tensor([ids], device=device),
        past_key_values=cache,
        use_cache=True,
        **given,
    )
    return rows_kept(output.logits[0], keep), output.past_key_values


def kept_numbers(cache: Any) -> int:
    """Of all tensors that a cache of transformers holds."""
    sizes = {tensor.untyped_storage()._cdata: tensor.numel() for tensor in _tensors(cache, set())}
    return sum(sizes.values())


def _tensors(held: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if isinstance(held, torch.Tensor):
        yield held
    if id(held) in seen or isinstance(held, (torch.Tensor, type)):
        return
    seen.add(id(held))
    inner: Iterable[Any] = ()
    if isinstance(held, dict):
        inner = held.values()
    elif isinstance(held, (list, tuple)):
        inner = held
    elif hasattr(held, "__dict__"):
        inner = vars(held).values()
    for each in inner:
        yield from _tensors(each, seen)
