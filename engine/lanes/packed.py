"""All sequences of a step in one row: attention and mask hooks keep them apart."""

from collections.abc import Callable, Sequence
from functools import cache
from inspect import signature

import torch
from transformers import PreTrainedModel

from moestro.engine.model import KVStore, PackedCache, SequenceKV

from .lane import Key, LanePart


class PackedLane:
    """One pass for all sequences, whose KV lies in the pages of one store."""

    packs = True

    def __init__(
        self,
        model: PreTrainedModel,
        cache: PackedCache,
        kv_pages: int,
        *,
        keeps_states: bool = False,
    ) -> None:
        """`model` has had its hooks and `cache` installed."""
        self.model, self.cache, self.keeps_states = model, cache, keeps_states
        self._store = KVStore(kv_pages)
        self._kv: dict[Key, SequenceKV] = {}

    def with_own_pages(self, pages: int) -> "PackedLane":
        """Another one over the same model, with a store of its own."""
        return PackedLane(self.model, self.cache, pages, keeps_states=self.keeps_states)

    @property
    def held_sequences(self) -> int:
        return len(self._kv)

    def run(self, parts: Sequence[LanePart], keep: Sequence[int]) -> torch.Tensor:
        self.cache.begin([(self._kv_of(part), len(part.ids)) for part in parts])
        done = False
        try:
            logits = run_packed(self.model, self.cache, parts, keep)
            done = True
        finally:
            self.cache.end(commit=done)
        return logits

    def fork(self, key: Key, twins: Sequence[tuple[Key, Sequence[int]]]) -> None:
        for twin, pages in twins:
            self._kv[twin] = self._kv[key].fork(pages)

    def forget(self, key: Key) -> None:
        self._kv.pop(key, None)

    def give_back(self, pages: Sequence[int]) -> None:
        self._store.give_back(pages)

    def _kv_of(self, part: LanePart) -> SequenceKV:
        if part.key not in self._kv:
            self._kv[part.key] = SequenceKV(self._store, part.pages)
        return self._kv[part.key]


def run_packed(
    model: PreTrainedModel, cache: PackedCache, parts: Sequence[LanePart], keep: Sequence[int]
) -> torch.Tensor:
    """One forward pass over `parts` in one row; `cache.begin` has been called with them.

    Returns the logits [len(keep), vocabulary] of the packed positions `keep`, in fp32 and where the
    model is.
    """
    device = model.device
    ids = [token for part in parts for token in part.ids]
    positions = [part.start + place for part in parts for place in range(len(part.ids))]
    output = model(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        past_key_values=cache,
        use_cache=True,
        **head_rows(model, keep),
    )
    return rows_kept(output.logits[0], keep)


@cache
def arguments_of(forward: Callable[..., object]) -> frozenset[str]:
    """Names of what a class's `forward` takes. Looked up once: every pass asks."""
    return frozenset(signature(forward).parameters)


def head_rows(model: PreTrainedModel, keep: Sequence[int]) -> dict[str, torch.Tensor]:
    """Tells `model` the rows that its head has to compute, where it can be told."""
    if "logits_to_keep" not in arguments_of(type(model).forward):
        return {}
    return {"logits_to_keep": torch.tensor(list(keep), device=model.device)}


def rows_kept(logits: torch.Tensor, keep: Sequence[int]) -> torch.Tensor:
    """[n, V] -> [len(keep), V] fp32, also of a model that computes all rows whatever it is told."""
    return (logits if len(logits) == len(keep) else logits[list(keep)]).float()


def last_rows(parts: Sequence[LanePart]) -> list[int]:
    """The place of each part's last token in the packed row."""
    ends, end = [], 0
    for part in parts:
        end += len(part.ids)
        ends.append(end - 1)
    return ends
