"""Two tiers change when weights come, and through which memory: not a bit of the output."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from engine_kit import KIB, opened, run_logits
from moestro.cache import LinkSpec
from moestro.engine import BadParameter, BudgetTooSmall, EngineConfig, LoadCancelled, Progress
from moestro.engine.facts.units import MIB
from moestro.engine.loader import load
from moestro.engine.planning.blueprint import inspect
from moestro.engine.planning.budgets import plan_memory

STEPS: list[list[tuple[int, list[int]]]] = [
    [(1, list(range(10, 40))), (2, list(range(60, 65)))],
    [(1, [7]), (2, [9])],
    [(1, [8]), (2, [9]), (3, list(range(100, 112)))],
    *[[(1, [5 + i]), (2, [90 + i]), (3, [130 + i])] for i in range(3)],
]
BLOB = 48 * KIB  # 3 x 64 x 64 fp32
ALL = 32  # 4 layers x 8 experts
FAST, SLOW = LinkSpec(1e10, 1e-6), LinkSpec(2e8, 5e-5)


def two(slots: int, host_slots: int, link: LinkSpec = FAST) -> dict[str, Any]:
    return {
        "device_memory_bytes": slots * BLOB,
        "host_memory_bytes": host_slots * BLOB,
        "link": link,
    }


@pytest.mark.parametrize("family", ["mixtral", pytest.param("olmoe", marks=pytest.mark.slow)])
def test_logits_are_bit_identical_over_all_tiers(family: str, tmp_path: Path) -> None:
    folder = tiny.build(family, tmp_path / "model")
    found = {}
    settings: dict[str, dict[str, Any]] = {
        "one tier, all": {"host_memory_bytes": ALL * BLOB},
        "one tier, fewest": {"host_memory_bytes": 2 * BLOB},
        "whole": two(8, ALL),
        "whole, slow": two(8, ALL, SLOW),
        "whole, all": two(ALL, ALL),
        "whole, fewest": two(2, ALL),
        "exclusive, small": two(4, 24),
        "exclusive": two(16, 8),
        "exclusive, slow": two(16, 8, SLOW),
        "fewest of both": two(2, 2),
    }
    for name, each in settings.items():
        for prefetch in (True, False):
            with opened(folder, tmp_path / "cache", prefetch=prefetch, **each) as loaded:
                found[name, prefetch] = run_logits(loaded, STEPS)
                host = loaded.cache.stats().host
                assert ("one tier" in name) == (host is None)
                if host is not None:
                    assert host.mode == name.partition(",")[0] or "fewest of both" in name
    wanted = found["one tier, all", False]
    for setting, logits in found.items():
        assert torch.equal(logits, wanted), setting


def test_what_the_host_holds_is_read_once_and_copied_again(tmp_path: Path) -> None:
    folder = tiny.build("mixtral", tmp_path / "model")
    with opened(
        folder, tmp_path / "cache", prefetch=False, host_compute=False, **two(2, ALL)
    ) as loaded:
        run_logits(loaded, STEPS)
        stats = loaded.cache.stats()
    assert stats.host is not None
    link = stats.host.link
    assert stats.loads == link.copies == stats.host.hits + stats.host.misses
    assert stats.loaded_bytes == link.copied_bytes == link.copies * BLOB
    assert stats.host.demand_reads == stats.host.misses <= ALL
    assert stats.host.read_bytes == stats.host.misses * BLOB
    assert stats.host.evictions == 0
    assert link.emulated and link.name == "emulated 10 GB/s, 1 us"


def test_what_only_shows_the_host_s_slots_takes_no_memory_and_what_copies_does(
    tmp_path: Path,
) -> None:
    folder = tiny.build("mixtral", tmp_path / "model")

    def planned(**settings: Any) -> dict[str, int]:
        config = EngineConfig(folder, tmp_path / "cache", kv_memory_bytes=4 * MIB, **settings)
        plan = plan_memory(config, inspect(config))
        assert sum(plan.parts().values()) == plan.total_bytes
        assert ("emulated" in "\n".join(plan.lines())) == ("device" in plan.parts())
        return plan.parts()

    assert "device" not in planned(host_memory_bytes=8 * BLOB)
    shown, copied = planned(**two(8, ALL)), planned(**two(8, 12))
    assert "device" not in shown
    assert (copied["device"], copied["experts"]) == (8 * BLOB, 12 * BLOB)


@pytest.mark.parametrize(("slots", "host_slots", "flag"), [(1, 8, "--device"), (8, 1, "--host")])
def test_a_tier_that_is_too_small_is_named(
    tmp_path: Path, slots: int, host_slots: int, flag: str
) -> None:
    folder = tiny.build("mixtral", tmp_path / "model")

    def stop(_: Progress) -> None:
        raise LoadCancelled("not so far")

    config = EngineConfig(folder, tmp_path / "cache", **two(slots, host_slots))
    with pytest.raises(BudgetTooSmall, match=f"{flag}-memory: .* too small"):
        load(config, stop)


@pytest.mark.parametrize("half", [{"link": FAST}, {"device_memory_bytes": MIB}])
def test_half_a_device_is_refused(tmp_path: Path, half: dict[str, Any]) -> None:
    with pytest.raises(BadParameter, match="belong together"):
        EngineConfig(tmp_path, tmp_path, **half)


def test_the_log_says_that_the_device_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny.build("mixtral", tmp_path / "model")
    with (
        caplog.at_level(logging.INFO, "moestro.engine"),
        opened(folder, tmp_path / "cache", **two(4, 8)),
    ):
        pass
    assert "imagines one behind an emulated 10 GB/s, 1 us link" in caplog.text
    assert "host (exclusive): 8 slots" in caplog.text
