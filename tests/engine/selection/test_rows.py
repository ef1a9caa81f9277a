"""Routing again among the kept experts, and the prompt's shares, against what they mean."""

import pytest
import torch

from moestro.engine.selection import Kept, PromptShares, StepRows
from moestro.engine.selection.rows import best_kept, only_kept

CPU = torch.device("cpu")


def masks(kept: list[list[int]], num_experts: int) -> torch.Tensor:
    found = torch.zeros((len(kept), num_experts + 1), dtype=torch.bool)
    for row, experts in enumerate(kept):
        found[row, experts] = True
    return found


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("kept", [2, 3, 5, 9])
def test_a_choice_among_the_kept_is_that_of_a_router_without_the_others(kept, normalized):
    torch.manual_seed(kept)
    logits = torch.randn(40, 9)
    mask = masks([torch.randperm(9)[:kept].tolist() for _ in range(40)], 9)
    ranks = logits.softmax(1).sort(dim=1, descending=True)
    shares, ids = ranks.values[:, :3], ranks.indices[:, :3]
    shares = shares / shares.sum(1, keepdim=True) if normalized else shares
    found_ids, found = best_kept(ids, shares, mask, (ranks.indices, ranks.values))
    masked = logits.masked_fill(~mask[:, :9], -torch.inf).topk(min(3, kept), dim=1)
    wanted = masked.values.softmax(1) * shares.sum(1, keepdim=True)
    assert torch.equal(found_ids[:, :kept], masked.indices)
    assert (found[:, :kept] - wanted).abs().max() < 1e-6
    assert not found[:, kept:].any()
    whole = mask.gather(1, ids).all(1)
    assert torch.equal(found[whole], shares[whole])


def test_of_a_choice_the_kept_stay_and_weigh_what_all_did():
    ids = torch.tensor([[3, 1, 0], [3, 1, 0], [2, 3, 1], [3, 4, 5], [4, 0, 1]])
    weights = torch.tensor(
        [[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.2, 0.5, 0.3], [0.5, 0.1, 0.2]]
    )
    mask = masks([[0, 1, 3], [1, 0], [0], [0], [1]], 4)  # 4 and 5 are ids of no expert
    found = only_kept(ids, weights, mask)
    wanted = [[0.5, 0.3, 0.2], [0, 0.6, 0.4], [0, 1.0, 0], [0.2, 0.5, 0.3], [0.5, 0, 0.3]]
    assert torch.allclose(found, torch.tensor(wanted))
    assert torch.equal(found[0], weights[0])


def test_shares_are_means_over_tokens_and_add_up_over_chunks():
    ids = torch.tensor([[0, 2], [1, 3], [2, 0], [1, 2]])  # 3 is no expert
    energies = torch.tensor([[1.0, 3.0], [4.0, 0.0], [0.0, 0.0], [5.0, 5.0]])
    whole, chunks = PromptShares([3], CPU), PromptShares([3], CPU)
    whole.add(0, ids, energies)
    for part in (slice(0, 1), slice(1, 4)):
        chunks.add(0, ids[part], energies[part])
    whole.tokens = chunks.tokens = 4
    assert whole.shares() == chunks.shares() == [[0.25 / 4, 1.5 / 4, 1.25 / 4]]


def test_rows_of_all_kept_experts_repeat_behind_the_others():
    ids, weights = torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.full((3, 2), 0.5)
    kept = Kept([(5, 0, 3)], [6], CPU)
    rows = StepRows(3, [], {1: kept}, [0.25], [None])
    hidden = torch.tensor([[1.0], [2.0], [3.0]])
    spread = rows.spread(0, hidden, ids, weights)
    assert spread.ids.tolist() == [[0, 1], [5, 0], [4, 5], [3, 0]]
    assert spread.weights.tolist() == [[0.5, 0.5], [0.25, 0.25], [0.5, 0.5], [0.25, 0.0]]
    assert spread.rows(hidden).flatten().tolist() == [1, 2, 3, 2]
    assert spread.joined(torch.tensor([[1.0], [2.0], [3.0], [4.0]])).flatten().tolist() == [1, 6, 3]
    assert (ids[1].tolist(), weights[1].tolist()) == ([2, 3], [0.5, 0.5])  # the router's own


@pytest.mark.parametrize(("weight", "wanted"), [(0.5, [5, 0, 3]), (None, [0, 5, 3])])
def test_guesses_are_the_fixed_set(weight, wanted):
    rows = StepRows(
        2, [], {1: Kept([(5, 0, 3)], [6], CPU)}, None if weight is None else [weight], [None]
    )
    assert rows.guesses(0, [[1, 2], [0, 4], [4, 0]]) == [[1, 2], wanted]  # the last one repeats
