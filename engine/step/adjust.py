"""What a request changes about the model's logits, from what has been said so far."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from .params import SamplingParams
from .truncation import Floats

FORBIDDEN = np.float32("-inf")


class Constraint(Protocol):
    """A grammar's state along one answer."""

    def forbid(self, logits: Floats) -> None:
        """Set the logits [V] of tokens that cannot come next to minus infinity."""

    def advance(self, token_id: int) -> None: ...

    @property
    def finished(self) -> bool:
        """Nothing but the end can follow."""


class Adjustments:
    """Of one sequence: penalties, bias, and what must not be chosen."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Iterable[int],
        stop_ids: Iterable[int] = (),
        constraint: Constraint | None = None,
    ) -> None:
        self._params = params
        self._stops = np.array(sorted({*stop_ids, *params.stop_token_ids}), np.int64)
        self._bias_ids = np.array([token for token, _ in params.logit_bias], np.int64)
        self._bias = np.array([bias for _, bias in params.logit_bias], np.float32)
        self._repeats = params.repetition_penalty != 1.0
        self._counts = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self._seen = _Tally(prompt_ids if self._repeats else ())
        self._said = _Tally(())
        self._generated_tokens = 0
        self._constraint = constraint
        self._changes = (
            self._repeats or self._counts or len(self._bias) > 0 or constraint is not None
        )

    def apply(self, logits: Floats) -> Floats:
        """`logits` [V] are left alone: a changed copy, or themselves where nothing changes."""
        if not self.changing:
            return logits
        changed = logits.copy()
        self._penalize(changed)
        changed[self._bias_ids] += self._bias
        if self._constraint is not None:
            self._constraint.forbid(changed)
        return self._unended(changed) if self._ending else changed

    @property
    def changing(self) -> bool:
        """The next logits are not left as they are."""
        return self._changes or self._ending

    @property
    def _ending(self) -> bool:
        """It is too early to end."""
        return self._generated_tokens < self._params.min_tokens

    @property
    def finished(self) -> bool:
        """The constraint's text is whole."""
        return self._constraint is not None and self._constraint.finished

    def saw(self, token_id: int) -> None:
        """`token_id` was chosen."""
        self._generated_tokens += 1
        if self._repeats:
            self._seen.add(token_id)
        if self._counts:
            self._said.add(token_id)
        if self._constraint is not None:
            self._constraint.advance(token_id)

    def _unended(self, logits: Floats) -> Floats:
        """Without the end, unless a constraint has left nothing else."""
        unended = logits.copy()
        unended[self._stops[self._stops < len(logits)]] = FORBIDDEN
        return logits if self._constraint is not None and np.isneginf(unended.max()) else unended

    def _penalize(self, logits: Floats) -> None:
        params = self._params
        if self._repeats:
            ids, _ = self._seen.arrays()
            held = logits[ids]
            penalty = np.float32(params.repetition_penalty)
            logits[ids] = np.where(held < 0, held * penalty, held / penalty)
        if self._counts:
            ids, times = self._said.arrays()
            frequency = times * np.float32(params.frequency_penalty)
            logits[ids] -= frequency + np.float32(params.presence_penalty)


class _Tally:
    """How often each token has come."""

    def __init__(self, ids: Iterable[int]) -> None:
        self._places: dict[int, int] = {}
        self._ids = np.empty(64, np.int64)
        self._times = np.zeros(64, np.float32)
        for token in ids:
            self.add(token)

    def add(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            self._ids = np.resize(self._ids, 2 * place)
            self._times = np.append(self._times, np.zeros(place, np.float32))
        self._ids[place] = token_id
        self._times[place] += 1

    def arrays(self) -> tuple["np.ndarray[tuple[int], np.dtype[np.int64]]", Floats]:
        used = len(self._places)
        return self._ids[:used], self._times[:used]
