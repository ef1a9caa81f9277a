"""`--expert-format auto`: which one is chosen, why, and that a start and its plan keep to it."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from engine_kit import opened
from imagined import imagined
from moestro.engine import EngineConfig, HostMemory, card_of, plan_card, verdict
from moestro.engine.facts import CPU, BudgetTooSmall
from moestro.engine.facts.units import GIB, MIB
from moestro.engine.forecasts import FormatShare, understand_settled
from moestro.engine.forecasts.auto_format import chosen_of, reason_of
from moestro.engine.planning import inspect
from moestro.engine.weights import Checkpoint

HOST = HostMemory((32 * GIB, "a host"))
WIDE = {"hidden_size": 1024, "intermediate_size": 2048}  # an expert in bf16: 12 MiB, 32 of them


def of(name: str, share: float | None, *, refused: bool = False) -> FormatShare:
    return FormatShare(name, share, "because" if share is None else "", refused)


@pytest.mark.parametrize(
    ("shares", "chosen"),
    [
        ([of("native", 1)], "native"),
        ([of("native", 0.6), of("int8", 1)], "int8"),
        ([of("native", 0.3), of("int8", 0.6), of("nf4", 1)], "nf4"),
        ([of("native", 0.1), of("int8", 0.2), of("nf4", 0.3)], "nf4"),
        ([of("native", None), of("int8", None), of("nf4", 0.1)], "nf4"),
        ([of("native", 0.1), of("int8", 0.2), of("nf4", None, refused=True)], "int8"),
        ([of("native", 0.1), *(of(x, None, refused=True) for x in ("int8", "nf4"))], "native"),
        ([of("native", None), of("int8", None), of("nf4", None)], "nf4"),
        ([of("native", None), of("int8", None), of("nf4", None, refused=True)], "int8"),
        ([of(name, None, refused=True) for name in ("native", "int8", "nf4")], "native"),
    ],
)
def test_the_finest_that_fits_whole_else_the_smallest(
    shares: list[FormatShare], chosen: str
) -> None:
    assert chosen_of(shares).expert_format == chosen


def test_the_line_has_shares_and_price() -> None:
    shares = [of("native", 0.09), of("int8", 0.19), of("nf4", 0.329)]
    assert reason_of(shares[2], shares) == (
        "expert format: nf4 (auto): 33 % of the experts fit the card's slots, native 9 %,"
        " int8 19 %; nf4 costs the demo 1.6 % perplexity"
    )
    shares = [of("native", None), of("int8", 0.999), of("nf4", None, refused=True)]
    assert reason_of(shares[1], shares) == (
        "expert format: int8 (auto): 99 % of the experts fit the card's slots, native none;"
        " no nf4 (because); int8 costs the demo no perplexity that could be measured"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("mixtral", tmp_path_factory.mktemp("auto") / "model", torch.bfloat16)


@pytest.fixture(scope="module")
def wide(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config alone, of experts that are large enough for a card to be small."""
    found = tmp_path_factory.mktemp("wide")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (found / "config.json").write_text(json.dumps(config | WIDE), "utf-8")
    return found


def slot_bytes(folder: Path, name: str) -> int:
    device = imagined(torch.bfloat16)(EngineConfig(folder, folder))
    return inspect(EngineConfig(folder, folder, expert_format=name), device).spec.slot_bytes


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_a_device_s_memory_settles_it(name: str, folder: Path, tmp_path: Path) -> None:
    """Slots for all experts in one format, and for fewer in every finer one."""
    room = 32 * slot_bytes(folder, name)
    config = EngineConfig(
        folder, tmp_path, device="auto", expert_format="auto", device_memory_bytes=room
    )
    device = imagined(torch.bfloat16)(config)
    found = understand_settled(config, Checkpoint(folder), device)
    assert found.config.expert_format == found.blueprint.codec.name == name
    assert found.config.pack_path.name == f"{name}.pack"
    named = EngineConfig(folder, tmp_path, expert_format=name)
    assert found.blueprint.spec == inspect(named, device).spec
    assert found.reason is not None and found.reason.startswith(
        f"expert format: {name} (auto): 100 % of the experts fit the card's slots"
    )


@pytest.mark.parametrize(
    ("name", "memory_bytes", "words"),
    [
        ("native", 2400 * MIB, ": 100 % of the experts fit the card's slots; native costs no"),
        ("int8", 1950 * MIB, ": 100 % of the experts fit the card's slots, native "),
        ("nf4", 1700 * MIB, " of the experts fit the card's slots, native "),
    ],
)
def test_a_card_s_plan_makes_the_choice_of_a_start_on_one(
    name: str, memory_bytes: int, words: str, wide: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"device": "cuda", "kv_memory_bytes": 4 * MIB}
    config = EngineConfig(
        wide, tmp_path, expert_format="auto", device_memory_bytes=memory_bytes, **asked
    )
    card = card_of(config)
    assert card is not None
    found = plan_card(config, card, disk_bytes_per_s=1e9, machine=HOST)
    assert found.expert_format == name
    assert found.format_reason is not None and f"{name} (auto)" in found.format_reason
    assert words in found.format_reason
    by_name = EngineConfig(
        wide, tmp_path, expert_format=name, device_memory_bytes=memory_bytes, **asked
    )
    same = plan_card(by_name, card, disk_bytes_per_s=1e9, machine=HOST)
    assert same.format_reason is None
    assert (same.slots, same.slot_bytes, same.formats) == (
        found.slots,
        found.slot_bytes,
        found.formats,
    )


def test_without_bitsandbytes_it_is_int8_and_the_line_says_what_to_install(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = EngineConfig(
        wide, tmp_path, device="cuda", expert_format="auto", device_memory_bytes=1700 * MIB
    )
    card = card_of(config)
    assert card is not None
    found = plan_card(config, card, disk_bytes_per_s=1e9, machine=HOST)
    assert found.expert_format == "int8" and found.resident_share < 1
    assert found.format_reason is not None
    assert "pip install 'moestro[nf4]'" in found.format_reason


def test_on_a_cpu_it_is_native(folder: Path, tmp_path: Path) -> None:
    config = EngineConfig(folder, tmp_path, expert_format="auto")
    found = understand_settled(config, Checkpoint(folder), CPU)
    assert (found.config.expert_format, found.shares) == ("native", ())
    assert found.reason is not None and "native (auto): the CPU" in found.reason
    assert "32 of 32 experts resident" in verdict(config)


def test_a_start_packs_and_says_what_was_settled(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    room = 32 * slot_bytes(folder, "int8")
    asked: dict[str, Any] = {"device": "auto", "expert_format": "auto"}
    asked["choose_device"] = imagined(torch.bfloat16)
    with (
        caplog.at_level(logging.INFO, "moestro.engine"),
        opened(folder, tmp_path, device_memory_bytes=room, **asked) as loaded,
    ):
        assert loaded.info.expert_format == "int8"
        assert loaded.cache.plan.holds_all
    (line,) = [text for text in caplog.messages if text.startswith("expert format: ")]
    assert line.startswith("expert format: int8 (auto): 100 % of the experts")
    assert {path.name for path in tmp_path.rglob("*.pack")} == {"int8.pack"}


def test_where_nothing_fits_the_smallest_is_refused_with_its_sums(
    folder: Path, tmp_path: Path
) -> None:
    with (
        pytest.raises(BudgetTooSmall, match="smallest value that works"),
        opened(
            folder,
            tmp_path,
            choose_device=imagined(),
            device="auto",
            device_memory_bytes=1000,
            expert_format="auto",
        ),
    ):
        pass
