"""The way back: a factorized model is its dense one, and what was changed has no way back."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moestro.engine import Manifest, Progress
from moestro.factorize import (
    FactorizeError,
    Plan,
    SplitOptions,
    apply_plan,
    make_plan,
    run_export,
)
from moestro.factorize.export import changes
from tiny_dense import CASES, REPEATED, write_tiny_dense
from tiny_llama import write_tiny_llama

OPTIONS = SplitOptions(
    experts=4, shared_neurons=16, top_k=3, calibration_tokens=64, window_tokens=64
)
CENTRED = {"olmo"}  # their weights are others, the model is the same
AS_LLAMA = {"mistral"}

EACH = [pytest.param(case, marks=pytest.mark.slow) if case in REPEATED else case for case in CASES]


def quiet(_: Progress) -> None:
    pass


def stock(folder: Path) -> Any:
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def prompt() -> torch.Tensor:
    return torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(1))


def kind_of(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text())["model_type"])


def assert_same_model(first: Path, second: Path) -> None:
    with torch.inference_mode():
        logits = [stock(folder)(prompt()).logits for folder in (first, second)]
    assert (logits[0] - logits[1]).abs().max() < 1e-4


def assert_same_weights(first: Path, second: Path) -> None:
    weights = [load_file(folder / "model.safetensors") for folder in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert tensor.dtype == weights[1][name].dtype, name
        assert torch.equal(tensor, weights[1][name]), name


@pytest.mark.parametrize("case", EACH)
def test_back_to_each_family(case: str, texts: list[Path], tmp_path: Path) -> None:
    dense = write_tiny_dense(tmp_path / "dense", case)
    plan = make_plan(dense, OPTIONS, texts, quiet)
    plan.write(tmp_path / "plan")
    apply_plan(plan, dense, tmp_path / "twin", quiet)
    run_export(tmp_path / "twin", tmp_path / "grouped", None, quiet)
    assert kind_of(tmp_path / "grouped") == ("llama" if case in AS_LLAMA else kind_of(dense))
    assert_same_model(dense, tmp_path / "grouped")
    if case not in CENTRED:
        run_export(tmp_path / "twin", tmp_path / "back", tmp_path / "plan", quiet)
        assert_same_weights(dense, tmp_path / "back")


# a product with 3 is not exact in float32
@pytest.mark.parametrize(("dtype", "top_k"), [(torch.float16, 3), (torch.float32, 2)])
@pytest.mark.parametrize("shared", [0, 16])
def test_other_types(
    dtype: torch.dtype, top_k: int, shared: int, texts: list[Path], tmp_path: Path
) -> None:
    dense = write_tiny_llama(tmp_path / "dense", dtype)
    plan = make_plan(dense, replace(OPTIONS, shared_neurons=shared, top_k=top_k), texts, quiet)
    plan.write(tmp_path / "plan")
    apply_plan(plan, dense, tmp_path / "twin", quiet)
    said = run_export(tmp_path / "twin", tmp_path / "back", tmp_path / "plan", quiet)
    assert_same_weights(dense, tmp_path / "back")
    assert f"Llama model (llama) in {str(dtype)[6:]}, its neurons in their old places" in said
    assert (tmp_path / "back" / "tokenizer.json").is_file()


@pytest.fixture
def twin(dense: Path, plan: Plan, tmp_path: Path) -> Path:
    apply_plan(plan, dense, tmp_path / "twin", quiet)
    return tmp_path / "twin"


def test_what_has_no_way_back(dense: Path, plan: Plan, twin: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(FactorizeError, match=r"no moestro\.json"):
        run_export(dense, out, None, quiet)
    with pytest.raises(FactorizeError, match="exists already"):
        run_export(twin, dense, None, quiet)
    other = replace(plan, scales=torch.full_like(plan.scales, 1.5))
    other.write(tmp_path / "other")
    with pytest.raises(FactorizeError, match="not the plan that made this model"):
        run_export(twin, out, tmp_path / "other", quiet)
    apply_plan(other, dense, tmp_path / "scaled", quiet)
    with pytest.raises(FactorizeError, match="scales are not one"):
        run_export(tmp_path / "scaled", out, tmp_path / "other", quiet)
    manifest = Manifest.read(twin)
    assert manifest is not None
    scaled = replace(manifest, method=f"{manifest.method}; scale calibrated")
    scaled.write(twin)
    with pytest.raises(FactorizeError, match=r"scaled \(scale calibrated\).*its source was"):
        run_export(twin, out, None, quiet)
    assert not out.exists()


@pytest.mark.parametrize("router", ["ridge", "none"])
def test_experts_of_unequal_widths_come_back(
    router: str, dense: Path, texts: list[Path], tmp_path: Path
) -> None:
    """With and without the plan, though the twin's experts have places for more neurons."""
    options = replace(OPTIONS, experts=5, router=router)
    plan = make_plan(dense, options, texts, quiet)
    plan.write(tmp_path / "plan")
    apply_plan(plan, dense, tmp_path / "twin", quiet)
    assert Manifest.read(tmp_path / "twin").neurons == 48  # type: ignore[union-attr]
    run_export(tmp_path / "twin", tmp_path / "grouped", None, quiet)
    assert_same_model(dense, tmp_path / "grouped")
    run_export(tmp_path / "twin", tmp_path / "back", tmp_path / "plan", quiet)
    assert_same_weights(dense, tmp_path / "back")


def test_recovered_weights_have_no_way_back(twin: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(twin)
    assert manifest is not None
    replace(manifest, deltas_sha256="ab12").write(twin)
    with pytest.raises(FactorizeError, match=r"changed after the split \(deltas_sha256\)"):
        run_export(twin, tmp_path / "out", None, quiet)
    said = asdict(manifest)
    assert changes(said) == changes(said | {"recovery": ""}) == ""
    assert "changed after the split (recovery)" in changes(said | {"recovery": "40 steps"})


def test_a_stopped_export_leaves_nothing(twin: Path, tmp_path: Path) -> None:
    def stop(notice: Progress) -> None:
        if notice.phase == "export" and notice.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_export(twin, tmp_path / "out", None, stop)
    assert [path.name for path in tmp_path.iterdir()] == ["twin"]
