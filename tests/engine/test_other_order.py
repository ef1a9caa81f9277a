"""What one build made, another start finds: matrices in rows, where tiles are computed with, and

the reverse. It says so in one line, makes its own, and computes what it would have without.
"""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from engine_kit import opened, run_logits
from moestro.engine import FormatMap

STEPS = [[(1, list(range(20, 40)))], [(1, [7]), (2, [3, 4, 5])]]
ROWS, TILES = "rows", "tile16"
MAP = FormatMap("int4", {"model.layers.1.mlp.experts": {"int8": [0, 3], "native": [5]}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("mixtral", tmp_path_factory.mktemp("order") / "model", torch.bfloat16)


def start(order: str, folder: Path, cache: Path, **settings: Any) -> torch.Tensor:
    """As by a build that has the library of the products, or by one that has none."""
    with pytest.MonkeyPatch.context() as patch:
        if order == ROWS:
            patch.setattr("moestro.engine.formats.named.library", lambda: None)
        with opened(folder, cache, **settings) as loaded:
            return run_logits(loaded, STEPS)


@pytest.mark.parametrize(
    ("expert_format", "first", "second"),
    [
        ("int8", ROWS, TILES),
        ("int8", TILES, ROWS),
        ("mixed", ROWS, TILES),
        pytest.param("mixed", TILES, ROWS, marks=pytest.mark.slow),
        pytest.param("native", ROWS, TILES, marks=pytest.mark.slow),
        pytest.param("native", TILES, ROWS, marks=pytest.mark.slow),
    ],
)
def test_the_other_order_is_named_and_made_anew(
    expert_format: str,
    first: str,
    second: str,
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    formats = {"expert_format": expert_format, "dense_format": "int8"}
    if expert_format == "mixed":
        MAP.write(tmp_path / "map.json")
        formats["expert_format"] = f"mixed:{tmp_path / 'map.json'}"
    cache, fresh = tmp_path / "cache", tmp_path / "fresh"
    own = start(second, folder, fresh, **formats)
    start(first, folder, cache, **formats)
    caplog.clear()
    assert torch.equal(start(second, folder, cache, **formats), own)
    pack, dense = (
        [line for line in caplog.messages if each in line]
        for each in ("its matrices lie in another order", "the dense weights are made anew")
    )
    (line,) = pack
    assert f"({first!r}, not {second!r}): building it again" in line
    (line,) = dense
    assert f"matrices in {first}" in line.partition(", not ")[0]
    assert f"matrices in {second}" in line.partition(", not ")[2]
    (pack_path,), (dense_path,) = fresh.rglob("*.pack"), fresh.rglob("dense.int8")
    for path in (pack_path, dense_path):
        assert path.read_bytes() == (cache / path.relative_to(fresh)).read_bytes()
    caplog.clear()
    assert torch.equal(start(second, folder, cache, **formats), own)
    assert "another" not in caplog.text
