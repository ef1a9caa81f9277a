import torch

from moestro.factorize.methods.calibration import LayerSample
from moestro.factorize.methods.split import assign_equally, cluster, split_neurons


def sample(tokens: int = 200, hidden: int = 16, neurons: int = 40) -> LayerSample:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(tokens, hidden, generator=generator)
    mixing = torch.randn(hidden, neurons, generator=generator)
    return LayerSample(inputs, inputs @ mixing, torch.randn(hidden, neurons, generator=generator))


def test_the_parts_name_every_neuron_once() -> None:
    shared, groups = split_neurons(sample(), shared=16, experts=4, seed=0)
    assert groups.shape == (4, 6)
    named = torch.cat([shared, groups.flatten()])
    assert named.sort().values.tolist() == list(range(40))


def test_the_shared_neurons_are_the_hottest() -> None:
    given = sample()
    shared, groups = split_neurons(given, shared=16, experts=4, seed=0)
    heat = given.neurons.abs().mean(dim=0) * given.down.norm(dim=0)
    assert heat[shared].min() >= heat[groups.flatten()].max()


def test_equal_inputs_give_equal_splits() -> None:
    first, again = (split_neurons(sample(), 16, 4, seed=5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_numbers_say_nothing_but_order() -> None:
    shared, groups = split_neurons(sample(), shared=16, experts=4, seed=1)
    assert torch.equal(shared, shared.sort().values)
    assert torch.equal(groups, groups.sort(dim=1).values)
    assert torch.equal(groups[:, 0], groups[:, 0].sort().values)


def test_no_shared_neurons_at_all() -> None:
    shared, groups = split_neurons(sample(), shared=0, experts=4, seed=0)
    assert (len(shared), tuple(groups.shape)) == (0, (4, 10))


def test_clear_clusters_are_found() -> None:
    truth = torch.arange(32) % 4
    points = torch.eye(4)[truth] + 0.05 * torch.randn(
        32, 4, generator=torch.Generator().manual_seed(0)
    )
    members = cluster(torch.nn.functional.normalize(points, dim=1), 4, seed=0)
    for e in range(4):
        assert len(set(truth[members == e].tolist())) == 1


def test_everybody_wants_the_same_cluster() -> None:
    likeness = torch.zeros(12, 3)
    likeness[:, 1] = torch.linspace(0.5, 1, 12)
    members = assign_equally(likeness)
    assert members.bincount(minlength=3).tolist() == [4, 4, 4]
    assert sorted((members == 1).nonzero().flatten().tolist()) == [8, 9, 10, 11]
