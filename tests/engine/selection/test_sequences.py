"""A sequence's neurons: which blocks, who shares their copies, and when these are let go."""

from collections.abc import Sequence

import torch

from moestro.engine.selection import Copy, PartRows, SequenceExperts

TOKENS, WIDTH = 16, 8
ONE, TWIN = (1, 0), (1, 1)


class Neurons:
    """Five blocks, that remember what was copied of them."""

    blocks = 5

    def __init__(self) -> None:
        self.copied: list[tuple[int, ...]] = []

    def copy(self, kept: Sequence[int]) -> Copy:
        self.copied.append(tuple(kept))
        return lambda rows: rows * 2

    def copy_bytes(self, kept: int) -> int:
        return 100 * kept


def after_a_prompt(density: float, let_go: list[str]) -> tuple[SequenceExperts, Neurons]:
    """Whose tokens used block i as much as (4, 1, 3, 0, 5)[i] says."""
    neurons = Neurons()
    found = SequenceExperts(
        [4], None, 2, torch.device("cpu"), [None], [neurons], lambda: let_go.append("copies")
    )
    part = [PartRows(ONE, 0, TOKENS, TOKENS, density)]
    rows = found.begin(part)
    assert rows is not None and rows.looks and not rows.copies(0)
    rows.look(0, torch.zeros(TOKENS, 1, dtype=torch.int64), torch.ones(TOKENS))
    energy = torch.tensor([4.0, 1.0, 3.0, 0.0, 5.0]).repeat_interleave(WIDTH)
    rows.look_at_neurons(0, WIDTH, lambda some: energy.sqrt().expand(TOKENS, -1)[some])
    found.end(part)
    return found, neurons


def test_the_best_blocks_are_copied_once_for_all_answers_and_let_go_with_the_last() -> None:
    let_go: list[str] = []
    found, neurons = after_a_prompt(0.6, let_go)
    found.fork(ONE, [TWIN])
    assert neurons.copied == [(0, 2, 4)] and found.kept_blocks(TWIN) == ((0, 2, 4),)
    assert found.stats().neuron_copies_bytes == found.copies_bytes(TOKENS, 0.6) == 300
    company = (2, 0)
    rows = found.begin([PartRows(k, TOKENS, 1, TOKENS, None) for k in (ONE, company, TWIN)])
    assert rows is not None
    ((own, _),) = rows.copies(0)
    assert own == [0, 2]
    found.forget(ONE)
    found.forget(company)
    assert found.stats().neuron_copies_bytes == 300 and not let_go
    found.forget(TWIN)
    assert found.stats().neuron_copies_bytes == 0 and let_go == ["copies"]


def test_all_blocks_are_no_copy() -> None:
    let_go: list[str] = []
    found, neurons = after_a_prompt(0.9, let_go)
    assert found.kept_blocks(ONE) == ((0, 1, 2, 3, 4),)
    assert not neurons.copied and found.copies_bytes(TOKENS, 0.9) == 0
    rows = found.begin([PartRows(ONE, TOKENS, 1, TOKENS, 0.9)])
    assert rows is not None and not rows.copies(0)
    found.forget(ONE)
    assert not let_go


def test_what_a_prompt_will_keep_is_known_before_it_is_computed() -> None:
    found, _ = after_a_prompt(0.6, [])
    assert [found.copies_bytes(TOKENS, density) for density in (None, 0.1, 0.5, 1.0)] == [
        *(0, 100, 300, 0),
    ]
    assert found.copies_bytes(1, 0.5) == 0  # too short to tell
