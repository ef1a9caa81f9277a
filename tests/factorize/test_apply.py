"""The twin with experts is the dense model: exactly with all of them, and as a stock checkpoint."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteMoeSharedForCausalLM

from moestro.engine import Manifest, Progress
from moestro.factorize import (
    Plan,
    SourceRefused,
    SplitOptions,
    apply_plan,
    make_plan,
)
from moestro.factorize.apply import storage_dtype
from moestro.factorize.evaluate import load_model
from moestro.factorize.facts import ROUTERS, SPLITS
from moestro.factorize.recovery.student import Student
from tiny_llama import write_tiny_llama


def quiet(_: Progress) -> None:
    pass


def stock(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def prompt(tokens: int = 20) -> torch.Tensor:
    return torch.randint(3, 250, (2, tokens), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def twin(dense: Path, plan: Plan, tmp_path: Path) -> Path:
    apply_plan(plan, dense, tmp_path / "twin", quiet)
    return tmp_path / "twin"


def assert_twins(dense_folder: Path, twin_folder: Path, experts: int) -> None:
    dense = stock(dense_folder, dtype=torch.float32)
    whole = load_model(twin_folder, experts_per_token=experts)
    ids = prompt()
    with torch.inference_mode():
        assert (dense(ids).logits - whole(ids).logits).abs().max() < 1e-4
        greedy = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
        first, second = (model.generate(ids[:1], **greedy) for model in (dense, whole))
    assert torch.equal(first, second)


def test_all_experts_together_are_the_dense_model(dense: Path, twin: Path) -> None:
    assert_twins(dense, twin, experts=4)


def test_stock_transformers_loads_it_in_fp32(twin: Path) -> None:
    model = stock(twin)
    assert isinstance(model, GraniteMoeSharedForCausalLM)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(twin)("a cat")["input_ids"]


def test_the_gates_are_even_and_the_factor_cancels_them(twin: Path) -> None:
    layer = stock(twin).model.layers[1]
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(2))
    _, gates, chosen = layer.block_sparse_moe.router(x)
    assert torch.equal(gates, torch.full((7, 3), 1 / 3))
    assert len({tuple(sorted(row)) for row in chosen.tolist()}) > 1


def test_fewer_experts_are_the_sum_of_those_that_run(dense: Path, plan: Plan, twin: Path) -> None:
    mlp = stock(dense, dtype=torch.float32).model.layers[0].mlp
    layer = load_model(twin, experts_per_token=2).model.layers[0]
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        found = layer.block_sparse_moe(x) + layer.shared_mlp(x)
        neurons = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        shared, routed = plan.order[0, :16].long(), plan.order[0, 16:].long().view(4, 8)
        _, _, chosen = layer.block_sparse_moe.router(x[0])
        for t, experts in enumerate(chosen):
            kept = torch.cat([shared, routed[experts].flatten()])
            expected = mlp.down_proj.weight[:, kept] @ neurons[0, t, kept]
            assert torch.allclose(found[0, t], expected, atol=1e-5)


def test_what_is_stored(twin: Path) -> None:
    with safe_open(twin / "model.safetensors", "pt") as file:
        types = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    routers = {name for name in types if "router" in name}
    assert len(routers) == 3
    assert {types.pop(name) for name in routers} == {torch.float32}
    assert set(types.values()) == {torch.float16}
    config = json.loads((twin / "config.json").read_text())
    assert (config["dtype"], config["num_experts_per_tok"]) == ("float32", 3)


def test_the_manifest_says_what_was_done(twin: Path, plan: Plan) -> None:
    manifest = Manifest.read(twin)
    assert manifest is not None
    assert (manifest.experts_per_token, manifest.num_experts) == (3, 4)
    assert (manifest.output_factor, manifest.plan_sha256) == (3.0, plan.sha256)


def test_the_same_bytes_each_time(dense: Path, plan: Plan, twin: Path, tmp_path: Path) -> None:
    apply_plan(plan, dense, tmp_path / "again", quiet)
    files = sorted(path.name for path in twin.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in files:
        assert (twin / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_several_files(
    dense: Path, plan: Plan, twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moestro.factorize.apply.SHARD_BYTES", 20_000)
    apply_plan(plan, dense, tmp_path / "parts", quiet)
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 1
    with torch.inference_mode():
        assert torch.equal(stock(twin)(prompt()).logits, stock(tmp_path / "parts")(prompt()).logits)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False, "attention_bias": True},
        {"head_dim": 16, "num_key_value_heads": 4, "rms_norm_eps": 1e-5},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        {"dtype": torch.float32},
        {"dtype": torch.float16},
    ],
    ids=["untied-bias", "head-dim", "rope-scaling", "float32", "float16"],
)
def test_other_llamas(
    changes: dict[str, Any], plan: Plan, texts: list[Path], tmp_path: Path
) -> None:
    source = write_tiny_llama(tmp_path / "dense", **changes)
    other = make_plan(source, plan.facts.options, texts, quiet)
    apply_plan(other, source, tmp_path / "twin", quiet)
    assert_twins(source, tmp_path / "twin", experts=4)


def test_without_a_shared_expert(
    dense: Path, texts: list[Path], plan: Plan, tmp_path: Path
) -> None:
    options = replace(plan.facts.options, shared_neurons=0)
    apply_plan(make_plan(dense, options, texts, quiet), dense, tmp_path / "twin", quiet)
    assert_twins(dense, tmp_path / "twin", experts=4)


@pytest.mark.parametrize(
    ("shared", "experts", "split"), [(16, 5, "coactivation"), (0, 7, "random")]
)
def test_any_number_of_experts(
    shared: int, experts: int, split: str, dense: Path, texts: list[Path], tmp_path: Path
) -> None:
    """48 neurons: 32 in 5 experts of 7 or 6, 48 in 7 of 7 or 6, which have 8 places each."""
    options = SplitOptions(
        experts=experts,
        shared_neurons=shared,
        top_k=experts,
        calibration_tokens=256,
        window_tokens=64,
        split=split,
    )
    plan = make_plan(dense, options, texts, quiet)
    apply_plan(plan, dense, tmp_path / "twin", quiet)
    assert_twins(dense, tmp_path / "twin", experts=experts)
    student = Student(stock(dense, dtype=torch.float32), plan, rank=1)
    few = load_model(tmp_path / "twin", experts_per_token=2)
    with torch.inference_mode():
        found = student.log_probabilities(student.hidden(prompt(), 2))
        assert (found - few(prompt()).logits.log_softmax(-1)).abs().mean() < 0.05


# each split and each router once; whichever router: with all experts it has nothing to choose
@pytest.mark.parametrize(("split", "router"), [*zip(SPLITS, ROUTERS, strict=True)])
def test_every_split_is_the_dense_model(
    split: str, router: str, dense: Path, texts: list[Path], tmp_path: Path
) -> None:
    options = SplitOptions(
        experts=6,
        shared_neurons=0,
        top_k=2,
        calibration_tokens=256,
        window_tokens=64,
        split=split,
        router=router,
        router_steps=20,
    )
    apply_plan(make_plan(dense, options, texts, quiet), dense, tmp_path / "twin", quiet)
    own = stock(tmp_path / "twin")
    whole = own if router == "none" else load_model(tmp_path / "twin", experts_per_token=6)
    with torch.inference_mode():
        expected = stock(dense, dtype=torch.float32)(prompt()).logits
        assert (expected - whole(prompt()).logits).abs().max() < 1e-4
        chosen = (expected - own(prompt()).logits).abs().max() > 1e-2
    assert bool(chosen) == (router != "none")
    assert type(own).__name__ == "GraniteMoeSharedForCausalLM"


@pytest.mark.parametrize(
    ("scales", "stored"),
    [([1.0, 1.3, 0.7], torch.float16), ([4 / 3] * 3, torch.bfloat16)],
    ids=["calibrated", "inverse-k"],
)
def test_a_layers_scale_stays_whatever_the_number_of_experts(
    scales: list[float], stored: torch.dtype, dense: Path, plan: Plan, twin: Path, tmp_path: Path
) -> None:
    scaled = replace(plan, scales=torch.tensor(scales))
    apply_plan(scaled, dense, tmp_path / "scaled", quiet)
    assert safe_dtype(tmp_path / "scaled") == stored
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2))
    for experts in (None, 1, 3, 4):
        pair = [load_model(folder, experts) for folder in (twin, tmp_path / "scaled")]
        for i, scale in enumerate(scales):
            plain, found = (model.model.layers[i].block_sparse_moe for model in pair)
            with torch.inference_mode():
                expected = plain(x) * scale
                assert (found(x) - expected).norm() < 1e-3 * expected.norm()


def safe_dtype(folder: Path) -> torch.dtype:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return file.get_tensor("model.layers.0.block_sparse_moe.output_linear.weight").dtype


def test_routers_that_no_stock_checkpoint_carries_lie_in_a_file_of_their_own(
    dense: Path, texts: list[Path], plan: Plan, tmp_path: Path
) -> None:
    options = replace(plan.facts.options, router="moefication", router_hidden=8, router_bias=1)
    rich = make_plan(dense, replace(options, router_steps=5), texts, quiet)
    weights = rich.router_weights
    assert weights.first is not None and weights.bias is not None
    apply_plan(rich, dense, tmp_path / "twin", quiet)
    assert_twins(dense, tmp_path / "twin", experts=4)
    router = load_model(tmp_path / "twin").model.layers[1].block_sparse_moe.router
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        logits, gates, chosen = router(x)
    first, last, bias = (part[1].float() for part in (weights.first, weights.last, weights.bias))
    expected = (x @ first.T).tanh() @ last.T + bias
    assert torch.allclose(logits, expected, atol=1e-5)
    assert torch.equal(chosen, expected.topk(3).indices)
    assert torch.equal(gates, torch.full((7, 3), 1 / 3))


def test_a_plan_for_other_weights_is_refused(plan: Plan, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "other", rms_norm_eps=1e-5, initializer_range=0.1)
    model = stock(other)
    model.model.norm.weight.data += 1
    model.save_pretrained(other)
    with pytest.raises(SourceRefused, match="other weights"):
        apply_plan(plan, other, tmp_path / "twin", quiet)
    bigger = write_tiny_llama(tmp_path / "bigger", num_hidden_layers=4)
    with pytest.raises(SourceRefused, match="shapes"):
        apply_plan(plan, bigger, tmp_path / "twin", quiet)
    assert not (tmp_path / "twin").exists()


def test_a_stopped_start_leaves_nothing(dense: Path, plan: Plan, tmp_path: Path) -> None:
    def stop(notice: Progress) -> None:
        if notice.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply_plan(plan, dense, tmp_path / "twin", stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "top_k", "stored"),
    [
        (torch.bfloat16, 12, torch.float16),
        (torch.bfloat16, 8, torch.bfloat16),
        (torch.bfloat16, 11, torch.float32),
        (torch.float16, 12, torch.float32),
        (torch.float16, 4, torch.float16),
        (torch.float32, 3, torch.float32),
    ],
)
def test_the_factor_is_exact(source: torch.dtype, top_k: int, stored: torch.dtype) -> None:
    assert storage_dtype(source, [float(top_k)]) == stored
    weights = (torch.randn(10_000, generator=torch.Generator().manual_seed(0)) + 2).to(source)
    exact = weights.double() * top_k
    if source != torch.float32:
        assert torch.equal((weights.float() * top_k).to(stored).double(), exact)
