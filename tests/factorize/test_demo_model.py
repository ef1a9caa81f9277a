"""The real demo model against the dense one it is made of, both by stock transformers.

Needs the network once. MOESTRO_TEST_CACHE names a folder that keeps the models between runs.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from moestro.engine import EngineConfig, Progress, plan_model
from moestro.factorize import (
    apply_plan,
    demo_deltas,
    demo_plan,
    prepare_demo,
    prepare_dense,
    sketch_demo,
)
from moestro.factorize.evaluate import load_model
from moestro.factorize.facts.folder_note import NOTE_NAME

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PROMPTS = (
    "Gravity is",
    "Once upon a time",
    "def fibonacci(n):",
    "The capital of France is",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
)


def quiet(_: Progress) -> None:
    pass


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kept = os.environ.get("MOESTRO_TEST_CACHE")
    return Path(kept) if kept else tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def demo(cache_dir: Path) -> Path:
    return prepare_demo(cache_dir, quiet)


@pytest.fixture(scope="module")
def pair(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The dense model, and it split by the demo's plan, with all experts, before any recovery."""
    dense, exact = prepare_dense(cache_dir, quiet), tmp_path_factory.mktemp("exact") / "model"
    apply_plan(demo_plan(), dense, exact, quiet)
    return load_model(dense), load_model(exact, experts_per_token=24)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_all_experts_together_are_the_dense_model(
    prompt: str, demo: Path, pair: tuple[Any, Any]
) -> None:
    ids = AutoTokenizer.from_pretrained(demo)(prompt, return_tensors="pt").input_ids
    dense, whole = pair
    with torch.inference_mode():
        assert (dense(ids).logits - whole(ids).logits).abs().max() < 1e-4
        greedy = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
        first, second = (model.generate(ids, **greedy) for model in pair)
    assert torch.equal(first, second)


def test_twelve_experts_speak_english(demo: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo)
    ids = tokenizer("Gravity is", return_tensors="pt").input_ids
    said = load_model(demo).generate(ids, max_new_tokens=24, do_sample=False)
    words = set(str(tokenizer.decode(said[0])).lower().split())
    assert words & {"the", "a", "of", "that", "is", "and"} > {"is"}


def test_plan_and_deltas_give_the_same_bytes_again(
    demo: Path, cache_dir: Path, tmp_path: Path
) -> None:
    dense = prepare_dense(cache_dir, quiet)
    apply_plan(demo_plan(), dense, tmp_path / "again", quiet, demo_deltas())
    for path in demo.iterdir():
        if path.name == NOTE_NAME:  # of the folder, with its times
            continue
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_demo_is_foretold_as_it_comes(demo: Path, tmp_path: Path) -> None:
    """The plan of what is not fetched yet is that of what was fetched."""
    bare = tmp_path / "bare"
    bare.mkdir()
    stored = sketch_demo(bare)
    for name in ("config.json", "moestro.json"):
        assert (bare / name).read_text("utf-8") == (demo / name).read_text("utf-8")
    budgets: Any = {"host_memory_bytes": 40 << 20, "kv_memory_bytes": 64 << 20, "threads": 1}
    before, after = (
        plan_model(EngineConfig(folder, tmp_path / "cache", **budgets), 1e9, None, stored)
        for folder in (bare, demo)
    )
    assert (before.has_weights, after.has_weights) == (False, True)
    assert before.stored_dtype == after.stored_dtype
    assert (before.slots, before.slot_bytes) == (after.slots, after.slot_bytes)
    assert (before.work, before.lane) == (after.work, after.lane)
    moving = ("interpreter", "packing")  # what this process has taken so far
    for name, count_bytes in before.plan.parts().items():
        assert name in moving or count_bytes == after.plan.parts()[name], name
