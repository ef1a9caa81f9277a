"""What a lane is, to the runner."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from transformers import PreTrainedModel

Key = tuple[int, int]  # of a sequence: its request's number and its answer's index


class LanePart(NamedTuple):
    """Tokens of one sequence that one step runs."""

    key: Key
    pages: Sequence[int]  # of the KV, that the sequence was given
    ids: list[int]
    start: int  # tokens of it that have been computed before


class PassLane(Protocol):
    """Owns the state of running sequences."""

    model: PreTrainedModel
    packs: bool
    """Whether one pass takes several sequences. If not, none shares KV with another either."""
    keeps_states: bool
    """Whether something beside keys and values goes on from one chunk of a prompt to the next."""

    @property
    def held_sequences(self) -> int: ...

    def run(self, parts: Sequence[LanePart], keep: Sequence[int]) -> torch.Tensor:
        """Logits [len(keep), V], fp32, of the rows `keep` of all parts in one row.

        One part where the lane does not pack. Commits; or, on an exception, does not.
        """

    def fork(self, key: Key, twins: Sequence[tuple[Key, Sequence[int]]]) -> None:
        """Each of `twins`, on pages of its own, goes on from where `key` is."""

    def forget(self, key: Key) -> None: ...

    def give_back(self, pages: Sequence[int]) -> None:
        """The memory of pages of the KV that were taken to stay empty."""
