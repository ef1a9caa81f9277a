"""Who is computed where they lie: the split, and that it changes no number on one processor."""

from pathlib import Path

import pytest
import torch

import tiny
from engine_kit import opened, run_logits
from moestro.engine.facts.config import LinkSpec
from moestro.engine.model.host_share import COPY_EVERY, HostShare


@pytest.mark.parametrize(
    ("copy", "host", "device", "residents", "below", "stay"),
    [
        (1.0, 1.0, 0.0, 0, 4, 2),  # as fast as each other: half each
        (1.0, 3.0, 0.0, 0, 4, 1),  # three copies take as long as the host's one
        (1.0, 9.0, 0.0, 0, 4, 0),
        (3.0, 1.0, 0.0, 0, 4, 3),  # the host is: one is copied for the next time
        (1.0, 0.5, 0.5, 8, 4, 0),  # the residents' time hides all copies
        (1.0, 0.5, 0.5, 4, 4, 1),  # three copies take 3, and so do 2 and 3 of computing
        (1.0, 0.1, 0.0, 0, 1, 1),
        (1.0, 0.1, 0.0, 0, 0, 0),
    ],
)
def test_the_split(
    copy: float, host: float, device: float, residents: int, below: int, stay: int
) -> None:
    assert HostShare(copy, host, device)(residents, below) == stay


def test_no_other_split_ends_sooner() -> None:
    for below in range(2, 9):
        for residents in range(5):
            share = HostShare(0.7, 0.4, 0.2)
            on_host = share(residents, below)
            ends_s = [
                max(residents * 0.2 + count * 0.4, (below - count) * 0.7)
                for count in range(below + 1)
            ]
            assert ends_s[on_host] == min(ends_s) or on_host == below - 1


def test_a_lone_miss_is_copied_now_and_then() -> None:
    share = HostShare(1.0, 0.1, 0.0)
    assert [share(0, 1) for _ in range(2 * COPY_EVERY)].count(0) == 2


@pytest.mark.parametrize("family", [pytest.param("mixtral", marks=pytest.mark.slow), "gpt_oss"])
@pytest.mark.parametrize("host_slots", [32, 8])
def test_placement_changes_no_bit_where_both_are_one_processor(
    family: str, host_slots: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny.build(family, tmp_path / "model")
    steps = [[(1, list(range(20, 40)))], *([(1, [token])] for token in range(30, 42))]
    with opened(folder, tmp_path / "cache", expert_format="int8") as loaded:
        wanted = run_logits(loaded, steps)
        slot_bytes = loaded.cache.plan.slot_bytes
    found = {}
    for host_compute in (True, False):
        with opened(
            folder,
            tmp_path / "cache",
            expert_format="int8",
            host_memory_bytes=host_slots * slot_bytes,
            device_memory_bytes=3 * slot_bytes,
            link=LinkSpec(4e6, 5e-4),  # slow: the host is always faster
            host_compute=host_compute,
            prefetch=False,
        ) as loaded:
            found[host_compute] = run_logits(loaded, steps)
            loaded.cache.check()
            stats = loaded.cache.stats()
            computed_below = sum(layer.computed_below for layer in stats.layers)
            assert (computed_below > 0) == host_compute
            assert stats.demand_loads + stats.prefetches_late + computed_below == stats.misses
    assert torch.equal(found[True], wanted)
    assert torch.equal(found[False], wanted)
