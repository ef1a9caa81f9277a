import torch

from moestro.factorize.methods.clusters import assign_equally, cluster, cluster_freely


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


def test_clusters_of_any_size_are_found() -> None:
    truth = torch.tensor([0] * 20 + [1] * 3 + [2] * 9)
    points = torch.eye(3)[truth] + 0.05 * torch.randn(
        32, 3, generator=torch.Generator().manual_seed(0)
    )
    members = cluster_freely(torch.nn.functional.normalize(points, dim=1), 3, seed=0)
    assert sorted(members.bincount().tolist()) == [3, 9, 20]


def test_more_clusters_than_kinds_of_points() -> None:
    members = cluster_freely(torch.eye(2)[torch.tensor([0, 1, 0, 1])], 4, seed=0)
    assert members[0] == members[2] != members[1] == members[3]
