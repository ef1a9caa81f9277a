"""The same output whatever the cache: size and prefetch change when weights come, nothing else."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from engine_kit import generate, opened, run_logits
from moestro.engine import SamplingParams
from moestro.engine.kernels import LayerStep
from moestro.engine.model import regret

STEPS: list[list[tuple[int, list[int]]]] = [
    [(1, list(range(10, 40))), (2, list(range(60, 65)))],
    [(1, [7]), (2, [9])],
    [(1, [8]), (2, [9]), (3, list(range(100, 112)))],
    *[[(1, [5 + i]), (2, [90 + i]), (3, [130 + i])] for i in range(6)],
]


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_logits_are_bit_identical_for_any_budget_and_prefetch(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = tiny.build("mixtral", tmp_path / "model", dtype)
    blob = 3 * 64 * 64 * dtype.itemsize
    found = {}
    for slots in (32, 16, 8, 2):  # all of 4 x 8, down to one token's two experts
        for prefetch in (True, False):
            settings = {"host_memory_bytes": slots * blob, "prefetch": prefetch}
            with opened(folder, tmp_path / "cache", **settings) as loaded:
                assert loaded.cache.plan.slots == slots
                found[slots, prefetch] = run_logits(loaded, STEPS)
    wanted = found[32, False]
    for setting, logits in found.items():
        assert torch.equal(logits, wanted), setting


def test_a_shared_expert_that_runs_while_others_are_read_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.build("granitemoeshared", tmp_path / "model")
    early = Counter[str]()
    run_shared = LayerStep.run_shared

    def counted(step: LayerStep, given: torch.Tensor | None = None) -> None:
        early["calls"] += 1
        run_shared(step, given)

    with opened(folder, tmp_path / "cache") as loaded:
        wanted, slot_bytes = run_logits(loaded, STEPS), loaded.cache.plan.slot_bytes
    monkeypatch.setattr(LayerStep, "run_shared", counted)
    with opened(folder, tmp_path / "cache", host_memory_bytes=6 * slot_bytes) as loaded:
        assert torch.equal(run_logits(loaded, STEPS), wanted)
    assert early["calls"] > 0


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_logits_are_bit_identical_while_prefetch_switches_itself_off_and_on(
    experts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MEASURING_STEPS", "WINDOW_STEPS", "FIRST_PAUSE_STEPS", "LONGEST_PAUSE_STEPS"):
        monkeypatch.setattr(regret, name, 1)
    folder = tiny.build("mixtral", tmp_path / "model")
    steps = STEPS + [[(1, [20 + i]), (2, [40 + i])] for i in range(24)]
    with opened(folder, tmp_path / "cache", prefetch=False) as loaded:
        wanted = run_logits(loaded, steps)
    settings = {"host_memory_bytes": 8 * 48 * 1024, "prefetch_experts": experts}
    with opened(folder, tmp_path / "cache", **settings) as loaded:
        assert torch.equal(run_logits(loaded, steps), wanted)
        stats = loaded.stats()
    # Guesses of a model this small cost more than they gain, so it was off, and on again.
    assert stats.prefetch.pauses > 1
    assert stats.cache.prefetch_loads > 0
    assert sum(layer.guessed for layer in stats.prefetch.layers) > 0


def test_company_changes_rounding_only(tmp_path: Path) -> None:
    folder = tiny.build("olmoe", tmp_path / "model")
    with opened(folder, tmp_path / "cache") as loaded:
        alone = run_logits(loaded, [[(1, list(range(10, 40)))], [(1, [7])]])
        company = run_logits(
            loaded,
            [
                [(1, list(range(10, 30))), (2, list(range(60, 65)))],
                [(2, [9]), (1, list(range(30, 40)))],
                [(1, [7]), (2, [9])],
            ],
        )
    assert (alone - company[[3, 4]]).abs().max() < 1e-5


@pytest.mark.parametrize("expert_format", ["native", "int8"])
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_company_changes_no_bit_of_what_is_computed_whole(
    family: str, expert_format: str, tmp_path: Path
) -> None:
    """A prompt in one step and single tokens after it, beside other prompts and other tokens."""
    folder = tiny.build(family, tmp_path / "model")
    prompt, tokens = list(range(10, 40)), [7, 8, 9, 10]
    with opened(folder, tmp_path / "cache", expert_format=expert_format) as loaded:
        alone = run_logits(loaded, [[(1, prompt)], *[[(1, [token])] for token in tokens]])
        steps = [
            [(2, list(range(60, 65))), (3, list(range(80, 120))), (1, prompt)],
            [(2, [9]), (1, [7]), (3, [11])],
            [(4, list(range(3, 23))), (1, [8]), (2, [12]), (5, [44])],
            [(1, [9])],
            [(1, [10]), (6, list(range(70, 90)))],
        ]
        company = run_logits(loaded, steps)
    at, rows = 0, []
    for step in steps:
        rows.append(at + [key for key, _ in step].index(1))
        at += len(step)
    assert torch.equal(company[rows], alone)


SEEDED = {
    "chosen": SamplingParams(
        max_tokens=10, temperature=1.2, top_k=50, top_p=0.95, seed=2**64 - 1, ignore_eos=True
    ),
    "penalized": SamplingParams(
        max_tokens=10,
        seed=-7,
        min_p=0.001,
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        logit_bias=((40, 3.0),),
        ignore_eos=True,
    ),
}


def test_sampling_repeats_by_seed_whatever_is_cached_and_in_company(tmp_path: Path) -> None:
    """Native, in fp32: the company's rounding does not reach a choice."""
    folder = tiny.build("mixtral", tmp_path / "model")
    prompt, other = list(range(10, 30)), list(range(60, 65))
    found: dict[str, set[tuple[int, ...]]] = {name: set() for name in SEEDED}
    for slots, prefetch in ((32, True), (6, False), (2, True)):
        settings: Any = {"host_memory_bytes": slots * 48 * 1024, "prefetch": prefetch}
        with opened(folder, tmp_path / "cache", **settings) as loaded:
            for name, params in SEEDED.items():
                alone = generate(loaded.engine, [prompt], params)  # the first finds nothing cached
                company = generate(loaded.engine, [other, prompt, other], params)[1]
                found[name] |= {tuple(one.ids) for one in (*alone, company)}
    assert [len(texts) for texts in found.values()] == [1] * len(SEEDED)
    assert [len(ids) for (ids,) in found.values()] == [10] * len(SEEDED)


def test_other_seeds_and_no_seed_say_something_else(tmp_path: Path) -> None:
    folder = tiny.build("mixtral", tmp_path / "model")
    seeds = [None, None, 0, 1, 1 + 2**32, 1 + 2**63]  # all 64 bits count
    with opened(folder, tmp_path / "cache") as loaded:
        texts = [
            generate(
                loaded.engine, [[5, 6]], SamplingParams(max_tokens=8, seed=seed, ignore_eos=True)
            )[0].text
            for seed in seeds
        ]
    assert len(set(texts)) == len(seeds)


def test_lookups_add_up_and_loads_without_prefetch_are_misses(tmp_path: Path) -> None:
    folder = tiny.build("mixtral", tmp_path / "model")
    settings = {"host_memory_bytes": 6 * 48 * 1024, "prefetch": False}
    with opened(folder, tmp_path / "cache", **settings) as loaded:
        before = loaded.cache.stats()
        run_logits(loaded, [[(1, [5])], [(1, [6])]])
        stats = loaded.cache.stats()
    assert stats.lookups - before.lookups == 2 * 4 * 2  # steps x layers x experts per token
    assert stats.loads == stats.misses
    assert stats.loaded_bytes == stats.loads * stats.slot_bytes
    assert stats.prefetch_hits == 0
