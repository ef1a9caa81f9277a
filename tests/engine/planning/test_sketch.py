"""A plan needs no weights: the config alone gives the same shapes as the files' headers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

import tiny
from moestro.engine import EngineConfig, ModelRefused, StartError, refuse_by_config
from moestro.engine.planning.blueprint import Blueprint, inspect, understand
from moestro.engine.planning.budgets import plan_memory
from moestro.engine.planning.sketch import Sketch, StoredWeights, weights_are_here


def without_weights(folder: Path, to: Path, index: dict[str, object] | None = None) -> Path:
    to.mkdir()
    shutil.copy(folder / "config.json", to)
    if index is not None:
        (to / "model.safetensors.index.json").write_text(json.dumps(index))
    return to


def facts(config: EngineConfig, blueprint: Blueprint) -> tuple[object, object, object]:
    parts = plan_memory(config, blueprint).parts()
    layers = [(layer.num_experts, layer.layout) for layer in blueprint.spec.layers]
    return {**parts, "interpreter": 0}, layers, blueprint.topology


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_config_alone_gives_the_same_plan(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    whole = EngineConfig(tiny.build(family, tmp_path / "whole", dtype), tmp_path)
    bare = EngineConfig(without_weights(whole.model_path, tmp_path / "bare"), tmp_path)
    assert weights_are_here(whole.model_path) and not weights_are_here(bare.model_path)
    sketched = understand(bare, Sketch(bare.model_path))
    assert facts(bare, sketched) == facts(whole, inspect(whole))
    refuse_by_config(bare)


@pytest.mark.parametrize(("itemsize", "stored"), [(4, torch.float32), (2, torch.bfloat16)])
def test_the_index_wins_over_the_config(itemsize: int, stored: torch.dtype, tmp_path: Path) -> None:
    whole = tiny.build("olmoe", tmp_path / "whole", torch.float16)
    total = itemsize * (whole / "model.safetensors").stat().st_size // 2
    index = {
        "metadata": {"total_size": total},
        "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"},
    }
    if stored is torch.bfloat16:
        config = json.loads((whole / "config.json").read_text())
        (whole / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    bare = without_weights(whole, tmp_path / "bare", index)
    assert not weights_are_here(bare)
    blueprint = understand(EngineConfig(bare, tmp_path), Sketch(bare))
    assert {dtype for dtype, _ in blueprint.experts[0].tensors.values()} == {stored}


@pytest.mark.parametrize(
    ("known", "experts", "routers"),
    [
        (None, torch.float16, torch.float16),  # the config's
        (StoredWeights(total_bytes=10**7), torch.float32, torch.float32),
        (StoredWeights(total_bytes=10**3), torch.float16, torch.float16),
        (StoredWeights(dtype_name="BF16"), torch.bfloat16, torch.bfloat16),
        (StoredWeights(dtype_name="BF16", wide=("gate.",)), torch.bfloat16, torch.float32),
    ],
)
def test_without_an_index_what_else_is_known_decides(
    known: StoredWeights | None, experts: torch.dtype, routers: torch.dtype, tmp_path: Path
) -> None:
    bare = without_weights(
        tiny.build("olmoe", tmp_path / "whole", torch.float16), tmp_path / "bare"
    )
    sketch = Sketch(bare, known)
    blueprint = understand(EngineConfig(bare, tmp_path), sketch)
    assert {dtype for dtype, _ in blueprint.experts[0].tensors.values()} == {experts}
    [router, *_] = [key for key in blueprint.dense_keys if "gate." in key]
    assert sketch.dtype_of(router) == routers


def test_a_broken_index_is_named(tmp_path: Path) -> None:
    bare = without_weights(tiny.build("olmoe", tmp_path / "whole"), tmp_path / "bare")
    (bare / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ModelRefused, match="index.json is not a weight index"):
        weights_are_here(bare)


def test_a_config_that_cannot_be_served_is_refused_without_weights(tmp_path: Path) -> None:
    bare = without_weights(tiny.build("olmoe", tmp_path / "whole"), tmp_path / "bare")
    refuse_by_config(EngineConfig(bare, tmp_path))
    with pytest.raises(StartError, match="--experts-per-token 9: the model has 8"):
        refuse_by_config(EngineConfig(bare, tmp_path, experts_per_token=9))
    dense = tmp_path / "dense"
    dense.mkdir()
    LlamaConfig(**tiny.WIDTHS).save_pretrained(dense)
    with pytest.raises(ModelRefused, match="if it is dense, split it"):
        refuse_by_config(EngineConfig(dense, tmp_path))
