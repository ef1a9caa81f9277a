"""Layers that take different numbers of experts: as plain torch says, and no other way."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from engine_kit import generate, opened, run_logits
from moestro.engine import (
    ROUTERS_NAME,
    EngineConfig,
    ModelRefused,
    SamplingParams,
    plan_model,
)
from moestro.engine.planning import inspect
from moestro.factorize.evaluate import load_model
from moestro.factorize.sequence_scores import prompts_can_choose, prompts_choose
from moestro.server.plans.words import model_lines, model_object
from tiny_routed import EXPERTS, LAYERS, TOP_K, build_routed, plain_reference

EXPERT_BYTES = 4096
LAYER_TOP_K = "6 1 2"
COUNTS = (6, 1, 2)
KINDS = ("linear", "relu-bias")  # the stock routers, and some in a file of their own
PROMPT, TOKENS = list(range(10, 40)), [7, 8, 9]
CHUNKS = [[(1, PROMPT[:10])], [(1, PROMPT[10:])], *([(1, [token])] for token in TOKENS)]
ENDS = [9, 29, 30, 31, 32]


def reference(folder: Path, kind: str, counts: tuple[int, ...]) -> torch.Tensor:
    """With `counts` experts per token in the layers, of outputs that were stored for COUNTS."""
    if kind == "linear":
        model: Any = load_model(folder)
    else:
        model = plain_reference(folder, kind, k=EXPERTS)
    for layer, count, stored in zip(model.model.layers, counts, COUNTS, strict=True):
        router = layer.block_sparse_moe.router
        router.forward = chosen(router, kind, count, stored)
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([PROMPT + TOKENS])).logits[0, ENDS]
    return logits


def chosen(router: Any, kind: str, count: int, stored: int) -> Any:
    forward = router.forward

    def first(rows: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        if kind == "linear":
            logits = rows @ router.weight.T * 2.0**30
            ids = logits.argsort(dim=1, descending=True, stable=True)
        else:
            _, _, ids = forward(rows)
        return None, torch.full((len(rows), count), 1 / stored), ids[:, :count]

    return first


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_plain_torch(kind: str, tmp_path: Path) -> None:
    """A prompt in chunks, tokens after it, with all experts in memory and with half of them."""
    folder = build_routed(tmp_path, kind, layer_top_k=LAYER_TOP_K)
    assert (folder / ROUTERS_NAME).exists() == (kind != "linear")
    wanted, found = reference(folder, kind, COUNTS), []
    for share in (1.0, 0.5):
        budget = {"host_memory_bytes": int(share * LAYERS * EXPERTS) * EXPERT_BYTES}
        with opened(folder, tmp_path / "cache", **budget) as loaded:
            before = loaded.cache.stats().lookups
            found.append(run_logits(loaded, CHUNKS))
            alone = loaded.cache.stats().lookups
            run_logits(loaded, [[(2, [5])]])
            assert loaded.cache.stats().lookups - alone == sum(COUNTS) and alone > before
    assert torch.equal(*found)
    assert (found[0] - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("asked", "counts"), [(2, (4, 1, 1)), (5, (7, 4, 4)), (8, (8, 8, 8))])
def test_another_number_of_experts_is_each_layers_in_proportion(
    kind: str, asked: int, counts: tuple[int, ...], tmp_path: Path
) -> None:
    """And the sum of a layer's experts keeps its scale, whatever its number was rounded to."""
    folder = build_routed(tmp_path, kind, layer_top_k=LAYER_TOP_K)
    wanted = reference(folder, kind, counts)
    config = EngineConfig(folder, tmp_path / "cache", experts_per_token=asked)
    assert inspect(config).topology.experts_per_token == counts
    with opened(folder, tmp_path / "cache", experts_per_token=asked) as loaded:
        assert (run_logits(loaded, CHUNKS) - wanted).abs().max() < 1e-4
    with torch.inference_mode():
        stock = load_model(folder, asked)(torch.tensor([PROMPT + TOKENS])).logits[0, ENDS]
    assert (stock - wanted).abs().max() < 1e-4


def test_all_experts_on_are_the_dense_model(tmp_path: Path) -> None:
    folder = build_routed(tmp_path, "linear", layer_top_k=LAYER_TOP_K)
    dense = LlamaForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    with torch.inference_mode():
        wanted = dense(torch.tensor([PROMPT + TOKENS])).logits[0, ENDS]
    with opened(folder, tmp_path / "cache", experts_per_token=EXPERTS) as loaded:
        assert (run_logits(loaded, CHUNKS) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_keeps_each_layers_part(kind: str, tmp_path: Path) -> None:
    """At the density of all layers' mean so many as tokens choose; at 1 all of them."""
    folder = build_routed(tmp_path, kind, layer_top_k=LAYER_TOP_K)
    for density, kept in ((TOP_K / EXPERTS, sum(COUNTS)), (1.0, LAYERS * EXPERTS)):
        params = SamplingParams(
            max_tokens=4, temperature=0.0, ignore_eos=True, expert_density=density
        )
        with opened(folder, tmp_path / "cache") as loaded:
            generate(loaded.engine, [PROMPT], params)
            assert loaded.stats().selection.kept_experts == kept


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_that_of_the_stock_model_whose_prompt_chose(kind: str, tmp_path: Path) -> None:
    """Every token behind the prompt, in one window of the stock model that ends with it."""
    folder = build_routed(tmp_path, kind, layer_top_k=LAYER_TOP_K)
    params = SamplingParams(
        max_tokens=len(PROMPT), temperature=0.0, ignore_eos=True, expert_density=TOP_K / EXPERTS
    )
    with opened(folder, tmp_path / "cache") as loaded:
        (answer,) = generate(loaded.engine, [PROMPT], params)
    model = load_model(folder)
    assert prompts_can_choose(folder)
    with prompts_choose(model), torch.inference_mode():
        logits = model(torch.tensor([PROMPT + answer.ids])).logits[0]
    behind = slice(len(PROMPT) - 1, -1)
    assert logits[behind].argmax(-1).tolist() == answer.ids
    with torch.inference_mode():
        by_token = model(torch.tensor([PROMPT + answer.ids])).logits[0]
    assert (by_token - logits)[: len(PROMPT)].abs().max() < 1e-5
    assert (by_token - logits)[len(PROMPT) :].abs().max() > 1e-2


def test_a_plan_foretells_it(tmp_path: Path) -> None:
    folder = build_routed(tmp_path, "linear", layer_top_k=LAYER_TOP_K)
    config = EngineConfig(folder, tmp_path / "cache", threads=1)
    for weights in (True, False):
        forecast = plan_model(config, disk_bytes_per_s=1e9)
        assert tuple(layer.experts_per_token for layer in forecast.work.layers) == COUNTS
        assert forecast.has_weights == weights
        assert forecast.work.mean_experts_per_token == TOP_K
        assert model_lines(forecast)[0].endswith(", 1 to 6 per token")
        assert model_object(forecast)["experts_per_token"] == 3
        (folder / "model.safetensors").unlink(missing_ok=True)


def test_stock_transformers_refuses_the_folder(tmp_path: Path) -> None:
    folder = build_routed(tmp_path, "linear", layer_top_k=LAYER_TOP_K)
    with pytest.raises(ValueError, match="moestro_routed"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_top_k": "6 1"}, "and 2 numbers of experts, for 3 layers"),
        ({"layer_top_k": "6 1 x"}, "layer_top_k '6 1 x'"),
        ({"layer_top_k": "6 0 2"}, "layer_top_k '6 0 2', top_k 3"),
        ({"layer_top_k": "6 1 9"}, "layer_top_k 9 of 8 experts"),
        ({"top_k": 0}, "top_k 0"),
        ({"layer_top_k": [6, 1, 2]}, "not text"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = build_routed(tmp_path, "linear", layer_top_k=LAYER_TOP_K)
    path = folder / "config.json"
    raw = json.loads(path.read_text("utf-8"))
    raw["moestro_routers"] |= changes
    path.write_text(json.dumps(raw), "utf-8")
    with pytest.raises(ModelRefused, match=words) as refused:
        inspect(EngineConfig(folder, tmp_path / "cache"))
    assert "\n" not in str(refused.value)


def test_a_folder_of_before_says_nothing_of_layers(tmp_path: Path) -> None:
    folder = build_routed(tmp_path, "relu-bias")
    path = folder / "config.json"
    raw = json.loads(path.read_text("utf-8"))
    for name in ("top_k", "layer_top_k"):
        del raw["moestro_routers"][name]
    path.write_text(json.dumps(raw), "utf-8")
    blueprint = inspect(EngineConfig(folder, tmp_path / "cache"))
    assert blueprint.topology.experts_per_token == (TOP_K,) * LAYERS
