"""What all splits promise, and what each of them is about."""

import pytest
import torch

from moestro.factorize.facts import SPLITS
from moestro.factorize.methods.calibration import LayerSample
from moestro.factorize.methods.split import SPLITTERS, heat, split_neurons

every_split = pytest.mark.parametrize("split", SPLITS)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sample(tokens: int = 192, hidden: int = 16, neurons: int = 40) -> LayerSample:
    inputs = normal(tokens, hidden, seed=3)
    activity = inputs @ normal(hidden, neurons, seed=4)
    down, gate = normal(hidden, neurons, seed=5), normal(neurons, hidden, seed=6)
    return LayerSample(inputs, activity, down, gate, window_tokens=32)


def test_the_table_has_the_names_that_are_offered() -> None:
    assert tuple(SPLITTERS) == SPLITS


@every_split
@pytest.mark.parametrize(("shared", "experts"), [(16, 4), (0, 8), (4, 12), (0, 2), (0, 7), (3, 27)])
def test_the_parts_name_every_neuron_once(split: str, shared: int, experts: int) -> None:
    always, groups = split_neurons(split, sample(), shared, experts, seed=0)
    least, more = divmod(40 - shared, experts)
    assert len(always) == shared
    assert [len(group) for group in groups] == [least + 1] * more + [least] * (experts - more)
    named = torch.cat([always, *groups])
    assert named.sort().values.tolist() == list(range(40))


@every_split
def test_the_shared_neurons_are_the_hottest(split: str) -> None:
    given = sample()
    shared, groups = split_neurons(split, given, shared=16, experts=4, seed=0)
    assert heat(given)[shared].min() >= heat(given)[torch.cat([*groups])].max()


@every_split
def test_equal_inputs_give_equal_splits(split: str) -> None:
    first, again = (split_neurons(split, sample(), 16, 4, seed=5) for _ in range(2))
    for one, other in zip((first[0], *first[1]), (again[0], *again[1]), strict=True):
        assert torch.equal(one, other)


@every_split
def test_numbers_say_nothing_but_order(split: str) -> None:
    shared, groups = split_neurons(split, sample(), shared=16, experts=4, seed=1)
    assert torch.equal(shared, shared.sort().values)
    assert all(torch.equal(group, group.sort().values) for group in groups)
    first = [int(group[0]) for group in groups]
    assert first == sorted(first)


@every_split
def test_the_sample_is_left_as_it_was(split: str) -> None:
    given, copy = sample(), sample()
    split_neurons(split, given, shared=8, experts=4, seed=0)
    for name in ("inputs", "neurons", "down", "gate"):
        assert torch.equal(getattr(given, name), getattr(copy, name))


def test_splits_differ() -> None:
    found = {split: split_neurons(split, sample(), 0, 4, seed=0)[1] for split in SPLITS}
    assert len({tuple(torch.cat([*groups]).tolist()) for groups in found.values()}) == len(SPLITS)


def test_another_seed_is_another_random_split() -> None:
    first, other = (split_neurons("random", sample(), 0, 4, seed=n)[1] for n in range(2))
    assert not torch.equal(torch.cat([*first]), torch.cat([*other]))


def test_slices_are_in_the_order_of_the_checkpoint() -> None:
    _, groups = split_neurons("contiguous", sample(), 0, 4, seed=0)
    assert torch.cat([*groups]).tolist() == list(range(40))


def planted(kinds: torch.Tensor, hidden: int = 16) -> torch.Tensor:
    """[I, hidden] one direction for each kind, and a little noise."""
    return torch.eye(hidden)[kinds] * 3 + 0.1 * normal(len(kinds), hidden)


def groups_of(split: str, given: LayerSample, experts: int = 4) -> set[tuple[int, ...]]:
    _, groups = split_neurons(split, given, 0, experts, seed=0)
    return {tuple(group.tolist()) for group in groups}


KINDS = torch.arange(40) % 4
BY_KIND = {tuple(range(kind, 40, 4)) for kind in range(4)}


def test_kmeans_groups_equal_gates() -> None:
    base = sample()
    # lengths differ: only the direction of a row counts
    gate = planted(KINDS) * (1 + normal(40, 1, seed=9).abs())
    given = LayerSample(base.inputs, base.neurons, base.down, gate, 32)
    assert groups_of("kmeans", given) == BY_KIND


def test_coactivation_groups_what_an_input_foresees() -> None:
    base = sample()
    inputs = normal(192, 16, seed=3).abs()
    given = LayerSample(inputs, inputs @ planted(KINDS).T, base.down, base.gate, 32)
    assert groups_of("coactivation", given) == BY_KIND


def test_importance_gives_each_kind_of_text_its_neurons() -> None:
    base = sample()
    topic = (torch.arange(192) // 16) % 4  # two topics in each window of 32: pieces are halves
    inputs = torch.eye(16)[topic] + 0.05 * normal(192, 16)
    neurons = 0.1 * normal(192, 40, seed=1) + 2.0 * (topic[:, None] == KINDS[None])
    given = LayerSample(inputs, neurons, base.down, base.gate, 32)
    assert groups_of("importance", given) == BY_KIND
