"""The real demo model against the dense one it is made of, both by stock transformers.

Needs the network once. MOESTRO_TEST_CACHE names a folder that keeps the models between runs.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.engine import EngineConfig, Progress, plan_model
from moestro.factorize import (
    apply_plan,
    demo_deltas,
    demo_plan,
    prepare_demo,
    prepare_dense,
    sketch_demo,
)
from moestro.factorize.evaluate import load_model, tokenizer_of
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
def whole(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense model split by the demo's plan, before any recovery."""
    dense, exact = prepare_dense(cache_dir, quiet), tmp_path_factory.mktemp("exact") / "model"
    apply_plan(demo_plan(), dense, exact, quiet)
    return exact


def test_all_experts_together_are_the_dense_model(demo: Path, whole: Path, cache_dir: Path) -> None:
    """In float64: in float32 the order of the sums alone is worth 1e-4 of logits of 30."""
    exact = load_model(whole, experts_per_token=24).double()
    exact.set_experts_implementation("eager")  # the grouped product has no float64
    dense = load_model(prepare_dense(cache_dir, quiet)).double()
    for prompt in PROMPTS:
        ids = tokenizer_of(demo)(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            assert (dense(ids).logits - exact(ids).logits).abs().max() < 1e-4, prompt


def test_all_experts_together_write_what_the_dense_model_writes(
    demo: Path, whole: Path, cache_dir: Path
) -> None:
    pair = load_model(prepare_dense(cache_dir, quiet)), load_model(whole, experts_per_token=24)
    greedy = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    for prompt in PROMPTS:
        ids = tokenizer_of(demo)(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            first, second = (model.generate(ids, **greedy) for model in pair)
        assert torch.equal(first, second), prompt


def test_twelve_experts_speak_english(demo: Path) -> None:
    tokenizer = tokenizer_of(demo)
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
