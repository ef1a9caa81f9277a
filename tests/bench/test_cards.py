"""The models of the table of cards, and one line of it."""

from pathlib import Path

import pytest
import torch
from cards.__main__ import PLACE
from cards.table import CARDS_GIB, CONFIGS, Model, models, planned, row, shares

from moestro.engine import EngineConfig
from moestro.engine.planning import Sketch, understand


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.json")), ids=lambda file: file.stem)
def test_the_widths_come_to_as_many_parameters_as_the_model_is_said_to_have(file: Path) -> None:
    model = Model.read(file)
    with model.folder() as folder:
        found = understand(EngineConfig(folder, folder), Sketch(folder))
        numbers = found.checkpoint.dense_bytes(found.dense_keys, 1)
    shapes = [shape for entry in found.experts for _, shape in entry.tensors.values()]
    numbers += sum(torch.Size(shape).numel() for shape in shapes)
    assert numbers / 1e9 == pytest.approx(model.billions, rel=0.002)


def test_the_table_has_what_the_plan_says_today() -> None:
    """Of the smallest model on a card; `make cards ARGS=--write` makes all of it anew."""
    model, place = models()[0], CARDS_GIB.index(12)
    line = next(x for x in PLACE.read_text().splitlines() if x.startswith(f"| {model.name} "))
    assert shares(planned(model, 12)) == [cell.strip() for cell in line.split("|")][4 + place]


@pytest.mark.slow
def test_a_line_of_both_tables_is_as_today() -> None:
    first, second = row(models()[0])
    lines = PLACE.read_text().splitlines()
    assert first in lines
    assert second in lines
