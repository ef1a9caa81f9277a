"""The second start reads the dense part that the first one made: the same bits, or made anew."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from engine_kit import opened, run_logits
from moestro.engine import weight_loading
from moestro.engine.weights import dense_file
from moestro.engine.weights.linears import TileLinear

STEPS = [[(1, list(range(20, 40)))], [(1, [7]), (2, [3, 4, 5])]]
KEPT = "as the first start made them"


def start(folder: Path, cache: Path, **settings: Any) -> torch.Tensor:
    with opened(folder, cache, **settings) as loaded:
        return run_logits(loaded, STEPS)


def kept_file(cache: Path, dense_format: str) -> Path:
    (found,) = cache.rglob(f"dense.{dense_format}")
    return found


@pytest.mark.parametrize(
    ("family", "dense_format"),
    [
        *((family, "int8") for family in sorted(tiny.FAMILIES)),
    ],
)
def test_the_second_start_has_the_bits_of_the_first(
    family: str,
    dense_format: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO, "moestro.engine")
    folder = tiny.build(family, tmp_path / "model", torch.bfloat16)
    first = start(folder, tmp_path / "cache", dense_format=dense_format)
    assert KEPT not in caplog.text
    monkeypatch.setattr(weight_loading, "load_dense", None)  # a second start must not call it
    second = start(folder, tmp_path / "cache", dense_format=dense_format)
    assert KEPT in caplog.text
    assert torch.equal(first, second)


def test_the_second_start_is_not_planned_to_convert(tmp_path: Path) -> None:
    """What is read into place is never there in two forms; another format's file does not count."""
    folder, planned = tiny.build("granitemoeshared", tmp_path / "model", torch.bfloat16), []
    for dense_format in ("int8", "int8", "native"):
        with opened(folder, tmp_path / "cache", dense_format=dense_format) as loaded:
            demand = loaded.plan.demand
        planned.append(demand.packing_bytes - demand.dense_bytes)
    assert planned[0] > 0 == planned[1] < planned[2]


@pytest.mark.parametrize("family", ["granitemoeshared", "gpt_oss", "deepseek_v3"])
def test_every_tensor_is_the_same(family: str, tmp_path: Path) -> None:
    """Also those that no step reads, and the memory that they take together."""
    folder, found = tiny.build(family, tmp_path / "model", torch.bfloat16), []
    for _ in range(2):
        with opened(folder, tmp_path / "cache", dense_format="int8") as loaded:
            model = loaded.engine.runner.lane.model
            tensors = dict(dense_file._dense_tensors(model))
            kinds = {path: type(module) for path, module in model.named_modules()}
            count = sum(parameter.numel() for parameter in model.parameters())
            found.append((tensors, kinds, count))
    (first, first_kinds, first_count), (second, second_kinds, second_count) = found
    assert TileLinear in first_kinds.values()
    assert first_kinds == second_kinds
    assert first_count == second_count
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert tensor.stride() == second[name].stride(), name
        assert torch.equal(tensor, second[name]), name


def test_native_weights_are_not_kept(tmp_path: Path) -> None:
    folder = tiny.build("mixtral", tmp_path / "model")
    start(folder, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/**/dense.*"))


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "unreadable"])
def test_a_damaged_file_is_made_anew(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, cache = tiny.build("mixtral", tmp_path / "model"), tmp_path / "cache"
    first = start(folder, cache, dense_format="int8")
    path = kept_file(cache, "int8")
    whole = path.read_bytes()
    if damage == "flipped":
        path.write_bytes(whole[:-5000] + bytes([whole[-5000] ^ 1]) + whole[-4999:])
    elif damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
        path.mkdir()
    assert torch.equal(start(folder, cache, dense_format="int8"), first)
    assert "the dense weights are made anew" in caplog.text
    if damage == "unreadable":  # a folder of that name stays, and costs the speed alone
        assert "will take longer" in caplog.text
    else:
        assert path.read_bytes() == whole


def test_a_changed_model_does_not_get_the_old_weights(tmp_path: Path) -> None:
    folder, cache = tmp_path / "model", tmp_path / "cache"
    tiny.build("mixtral", folder)
    first = start(folder, cache, dense_format="int8")
    shutil.rmtree(folder)
    tiny.build("mixtral", folder, torch.bfloat16)
    second = start(folder, cache, dense_format="int8")
    assert not torch.equal(first, second)
    assert torch.equal(second, start(folder, tmp_path / "other", dense_format="int8"))


def test_a_file_of_another_layout_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right key, but tensors are missing: half a model must not be served."""
    folder, cache = tiny.build("mixtral", tmp_path / "model"), tmp_path / "cache"
    tensors = dense_file._dense_tensors
    with monkeypatch.context() as broken:
        broken.setattr(dense_file, "_dense_tensors", lambda model: list(tensors(model))[:-1])
        first = start(folder, cache, dense_format="int8")
    assert torch.equal(start(folder, cache, dense_format="int8"), first)
    assert "does not fit the model" in caplog.text
    caplog.clear()
    start(folder, cache, dense_format="int8")
    assert "does not fit the model" not in caplog.text
