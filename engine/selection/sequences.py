"""Every running sequence that wants its own experts: from its prompt's shares to what it keeps."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch

from moestro.engine.facts import SEQUENCE_CHOICES, SelectionStats

from .keep import kept_count, largest
from .ranking import Ranking
from .rows import Copy, Kept, KeptNeurons, PromptShares, StepRows

Key = tuple[int, int]  # of a sequence


class PartRows(NamedTuple):
    """Rows of one sequence in a pass."""

    key: Key
    first_token: int  # of the sequence, that the first row is
    tokens: int
    prompt_tokens: int
    density: float | None  # of the experts to keep; None: every token chooses


class NeuronLayer(Protocol):
    """Neurons that every token runs: a shared expert's, or those of a layer without experts."""

    @property
    def blocks(self) -> int:
        """How many, in blocks that are kept or not as a whole."""

    def copy(self, kept: Sequence[int]) -> Copy:
        """Computes with these blocks alone, from `copy_bytes` of its own."""

    def copy_bytes(self, kept: int) -> int:
        """Of so many blocks."""


class SequenceExperts:
    """One for a model. `begin` a pass, `end` it when it has succeeded; `fork` and `forget`."""

    def __init__(
        self,
        num_experts: Sequence[int],
        kept_weights: Sequence[float] | None,
        least_prompt_tokens: int,
        device: torch.device,
        rankings: Sequence[Ranking | None],
        neurons: Sequence[NeuronLayer] = (),
        after_copies: Callable[[], None] = lambda: None,
        density_of: Callable[[int, float], float] = lambda layer, density: density,
    ) -> None:
        """`num_experts` of each layer; `kept_weights` and `rankings` as in StepRows.

        Prompts shorter than `least_prompt_tokens` tell too little: their tokens choose. Of
        `neurons` the same density of blocks is kept as of experts. `after_copies` is called
        whenever copies of them have been let go: others wait for their memory. `density_of` a layer
        is what it keeps of its experts where a sequence keeps so many of all.
        """
        self._density_of = density_of
        self._num_experts = tuple(num_experts)
        self._weights = kept_weights
        self._least_tokens = least_prompt_tokens
        self._device = device
        self._rankings = tuple(rankings)
        self._neurons, self._after_copies = tuple(neurons), after_copies
        self._shares: dict[Key, PromptShares] = {}  # of prompts that are being computed
        self._kept: dict[Key, Kept] = {}
        self._requests = dict.fromkeys(SEQUENCE_CHOICES, 0)
        self._kept_experts, self._known_experts = 0, 0

    def stats(self) -> SelectionStats:
        copies = {id(kept): kept.neurons.size_bytes for kept in self._kept.values()}
        return SelectionStats(
            dict(self._requests), self._kept_experts, self._known_experts, sum(copies.values())
        )

    @property
    def neuron_layers(self) -> int:
        return len(self._neurons)

    def copies_bytes(self, prompt_tokens: int, density: float | None) -> int:
        """What a sequence, with all its forks, will keep in copies of neurons."""
        if density is None or prompt_tokens < self._least_tokens:
            return 0
        kept = ((layer, kept_count(layer.blocks, density)) for layer in self._neurons)
        return sum(layer.copy_bytes(count) for layer, count in kept if count < layer.blocks)

    @property
    def held_sequences(self) -> int:
        return len(self._shares.keys() | self._kept.keys())

    def begin(self, parts: Sequence[PartRows]) -> StepRows | None:
        """`parts` in packed order; None where every token of them chooses."""
        prompts: list[tuple[int, int, PromptShares]] = []
        kept: dict[int, Kept] = {}
        row = 0
        for part in parts:
            if (own := self._kept.get(part.key)) is not None:
                kept |= dict.fromkeys(range(row, row + part.tokens), own)
            elif self._looks_at(part):
                shares = self._shares.setdefault(part.key, self._no_shares())
                prompts.append((row, row + _prompt_rows(part), shares))
            row += part.tokens
        if not prompts and not kept:
            return None
        return StepRows(row, prompts, kept, self._weights, self._rankings)

    def end(self, parts: Sequence[PartRows]) -> None:
        """`parts` have been computed: where a prompt ends, its sequence chooses."""
        for part in parts:
            if part.key in self._shares:
                self._shares[part.key].tokens += _prompt_rows(part)
            if part.first_token < part.prompt_tokens <= part.first_token + part.tokens:
                self._choose(part)

    def kept(self, key: Key) -> tuple[tuple[int, ...], ...] | None:
        """Experts of each layer, the largest share first; None: every token chooses."""
        found = self._kept.get(key)
        return None if found is None else found.layers

    def kept_blocks(self, key: Key) -> tuple[tuple[int, ...], ...] | None:
        """Blocks of each layer of neurons, in their own order; None: all neurons serve."""
        found = self._kept.get(key)
        return None if found is None else found.neurons.blocks

    def fork(self, key: Key, twins: Iterable[Key]) -> None:
        """Answers to the same prompt keep the same experts."""
        if key in self._kept:
            self._kept |= dict.fromkeys(twins, self._kept[key])

    def forget(self, key: Key) -> None:
        self._shares.pop(key, None)
        gone = self._kept.pop(key, None)
        if gone is not None and gone.neurons.size_bytes and gone not in self._kept.values():
            del gone
            self._after_copies()

    def _looks_at(self, part: PartRows) -> bool:
        long_enough = part.prompt_tokens >= self._least_tokens
        return part.density is not None and long_enough and _prompt_rows(part) > 0

    def _no_shares(self) -> PromptShares:
        blocks = [layer.blocks for layer in self._neurons]
        return PromptShares((*self._num_experts, *blocks), self._device)

    def _choose(self, part: PartRows) -> None:
        shares = self._shares.pop(part.key, None)
        if part.density is None:
            self._requests["token"] += 1
        elif shares is None:
            self._requests["short_prompt"] += 1
        else:
            density, found = part.density, shares.shares()
            routed = enumerate(found[: len(self._num_experts)])
            layers = [largest(each, self._density_of(layer, density)) for layer, each in routed]
            blocks = [tuple(sorted(largest(each, density))) for each in found[len(layers) :]]
            copies = [
                None if len(own) == layer.blocks else layer.copy(own)
                for layer, own in zip(self._neurons, blocks, strict=True)
            ]
            size_bytes = self.copies_bytes(part.prompt_tokens, part.density)
            neurons = KeptNeurons(tuple(blocks), tuple(copies), size_bytes)
            self._kept[part.key] = Kept(layers, self._num_experts, self._device, neurons)
            self._requests["sequence"] += 1
            self._kept_experts += sum(map(len, layers))
            self._known_experts += sum(self._num_experts)


def _prompt_rows(part: PartRows) -> int:
    """How many of its rows, the first ones, are of the prompt."""
    return max(0, min(part.tokens, part.prompt_tokens - part.first_token))
