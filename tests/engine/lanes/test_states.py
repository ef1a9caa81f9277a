"""Models whose layers keep more of a sequence than keys and values: split, or one pass for each."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_families
from engine_kit import generate, opened, run_logits
from moestro.engine import EngineConfig, PromptTooLong, SamplingParams
from moestro.engine.facts import Lane
from moestro.engine.lanes import LanePart, PackedLane, SequentialLane
from moestro.engine.lanes.sequential import kept_numbers
from moestro.engine.loader import Loaded
from moestro.engine.planning import inspect
from moestro.engine.step.sequence import Sequence as Running

TOLERANCE = 1e-4
GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
LANES = {"qwen3_next": Lane.PACKED, "jamba": Lane.PACKED, "minimax": Lane.SEQUENTIAL}
WHOLE_PROMPTS = {"jamba"}


def small(folder: Path, **settings: Any) -> Any:
    """Opened with room for a part of its experts."""
    return opened(folder, folder.parent / "cache", host_memory_bytes=8 * 52 * 1024, **settings)


@pytest.fixture(
    params=[
        *(name for name in LANES if name not in WHOLE_PROMPTS),
        *(pytest.param(name, marks=pytest.mark.slow) for name in WHOLE_PROMPTS),
    ]
)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny_families.build(request.param, tmp_path / request.param)


def test_greedy_tokens_in_company_equal_stock(folder: Path) -> None:
    prompts = torch.randint(200, (3, 9), generator=torch.Generator().manual_seed(2)).tolist()
    with small(folder) as loaded:
        assert loaded.info.lane == LANES[folder.name].value
        assert loaded.cache.stats().misses > 0
        found = [answer.ids for answer in generate(loaded.engine, prompts, GREEDY)]
        assert loaded.engine.runner.held_sequences == 0
    stock = tiny_families.oracle(folder.name, folder)
    for prompt, ids in zip(prompts, found, strict=True):
        wanted = stock.generate(
            torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None
        )
        assert ids == wanted[0, 9:].tolist()


@pytest.mark.slow  # of every model type in `make families`
def test_chunks_of_a_prompt_beside_another_equal_stock(folder: Path) -> None:
    if folder.name in WHOLE_PROMPTS:
        pytest.skip("its prompts are computed whole")
    ids = torch.randint(200, (14,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        wanted = tiny_families.oracle(folder.name, folder)(torch.tensor([ids])).logits[0]
    with small(folder) as loaded:
        found = run_logits(
            loaded,
            [[(1, ids[:8]), (2, [5, 6, 7])], [(1, ids[8:11]), (2, [9])], [(1, ids[11:])]],
        )
    assert (found[[0, 2, 4]] - wanted[[7, 10, 13]]).abs().max() < TOLERANCE


def test_answers_to_one_prompt_go_on_from_copies_of_its_state(folder: Path) -> None:
    prompt = list(range(20, 29))
    with small(folder) as loaded:
        (alone,) = generate(loaded.engine, [prompt], GREEDY)
        (both,) = generate(loaded.engine, [prompt], replace(GREEDY, n=2))
    assert both.ids[::2] == both.ids[1::2] == alone.ids


def test_whole_prompts_are_bounded_by_the_step(tmp_path: Path) -> None:
    folder = tiny_families.build("jamba", tmp_path / "model")
    for _ in range(2):  # the second start finds the verdict of the first one
        with small(folder, max_step_tokens=32) as loaded:
            assert loaded.engine.scheduler.limits.whole_prompts
            validate(loaded, 32)
            with pytest.raises(PromptTooLong, match=r"33 tokens.*--max-step-tokens"):
                validate(loaded, 33)
            answers = generate(loaded.engine, [[7] * 32, [8] * 20], GREEDY)
            alone = generate(loaded.engine, [[8] * 20], GREEDY)
            assert answers[1].ids == alone[0].ids


def test_a_client_that_goes_away_takes_its_state_along(folder: Path) -> None:
    with small(folder, max_step_tokens=16) as loaded:
        engine = loaded.engine
        staying = Running(1, list(range(20, 29)), GREEDY)
        leaving = Running(2, list(range(40, 52)), GREEDY)
        engine.add(staying)
        engine.add(leaving)
        said: list[int] = []
        while not engine.idle:
            for sequence, event in engine.step():
                if sequence is staying:
                    said += event.token_ids
            if len(said) == 3:
                engine.cancel(leaving)
                assert engine.runner.held_sequences == 1
            engine.check()
        assert engine.runner.held_sequences == 0
        assert said == generate(engine, [staying.token_ids[:9]], GREEDY)[0].ids


def validate(loaded: Loaded, tokens: int) -> None:
    loaded.engine.validate([1] * tokens, SamplingParams(max_tokens=4))


def test_a_sequence_keeps_no_more_than_is_planned_for(folder: Path, tmp_path: Path) -> None:
    topology = inspect(EngineConfig(folder, tmp_path)).topology
    with small(folder) as loaded, torch.inference_mode():
        lane = loaded.engine.runner.lane
        for number, tokens in enumerate((1, 8, 100)):
            key, pages = (number, 0), range(8 * number, 8 * number + 8)
            lane.run([LanePart(key, pages, [3] * tokens, 0)], [tokens - 1])
            if isinstance(lane, SequentialLane):
                held = kept_numbers(lane._caches[key])
                planned = topology.kv_fixed_numbers + tokens * topology.kv_numbers_per_token
            else:
                assert isinstance(lane, PackedLane)
                held, planned = kept_numbers(lane._kv[key].state), topology.kv_fixed_numbers
            assert 0.5 * planned < held <= planned


def test_the_reason_of_a_lane_is_said(tmp_path: Path) -> None:
    folder = tiny_families.build("minimax", tmp_path / "model")
    line = inspect(EngineConfig(folder, tmp_path)).topology.lane.line
    assert line == (
        "lane: sequential, a pass for each sequence of a step (it keeps its state in a class of its"
        " own (MiniMaxCache))"
    )
