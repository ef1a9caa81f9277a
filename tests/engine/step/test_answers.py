"""Several answers to one prompt, and log probabilities of prompts: against stock transformers."""

from collections import defaultdict
from pathlib import Path

import pytest
import torch

import tiny
from engine_kit import generate, opened
from moestro.engine import BadParameter, PromptTooLong, SamplingParams, TokenEvent
from moestro.engine.loader import Loaded
from moestro.engine.step.sequence import Sequence

PROMPT = [7 * i % 200 for i in range(37)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("qwen3_moe", tmp_path_factory.mktemp("answers") / "model")


def events_of(loaded: Loaded, *requests: Sequence) -> dict[tuple[int, int], list[TokenEvent]]:
    """By request and answer."""
    found: dict[tuple[int, int], list[TokenEvent]] = defaultdict(list)
    for request in requests:
        loaded.engine.add(request)
    while not loaded.engine.idle:
        for sequence, event in loaded.engine.step():
            found[sequence.number, event.index].append(event)
        loaded.engine.check()
    return dict(found)


def ids_of(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def test_answers_are_those_of_separate_requests_and_the_prompt_runs_once(folder: Path) -> None:
    params = SamplingParams(max_tokens=20, seed=3, n=3, ignore_eos=True, logprobs=2)
    with opened(folder, folder.parent / "cache", max_running=4) as loaded:
        found = events_of(loaded, Sequence(1, PROMPT, params))
        stats = loaded.stats()
    answers = [ids_of(found[1, index]) for index in range(3)]
    assert stats.prompt_tokens == len(PROMPT) and stats.generation_tokens == 60
    assert stats.kv_used_bytes == 0
    assert len({tuple(ids) for ids in answers}) == 3
    stock = tiny.oracle(folder)
    for index, ids in enumerate(answers):
        with torch.inference_mode():
            logits = stock(torch.tensor([PROMPT + ids])).logits[0, len(PROMPT) - 1 : -1]
        wanted = logits.log_softmax(-1)[torch.arange(20), torch.tensor(ids)]
        scores = [score for event in found[1, index] for score in event.logprobs]
        assert [score.token_id for score in scores] == ids
        assert [score.logprob for score in scores] == pytest.approx(wanted.tolist(), abs=1e-4)
        assert all(len(score.top) == 2 for score in scores)


def test_the_first_answer_is_that_of_n_1_and_greedy_ones_are_all_the_same(folder: Path) -> None:
    with opened(folder, folder.parent / "cache", max_running=4) as loaded:
        alone = SamplingParams(max_tokens=9, seed=5, ignore_eos=True)
        found = events_of(
            loaded,
            Sequence(1, PROMPT, alone),
            Sequence(2, PROMPT, SamplingParams(max_tokens=9, seed=5, ignore_eos=True, n=3)),
        )
        assert ids_of(found[1, 0]) == ids_of(found[2, 0]) != ids_of(found[2, 1])
        greedy = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True, n=4)
        found = events_of(loaded, Sequence(1, PROMPT, greedy))
        assert len({tuple(ids_of(found[1, index])) for index in range(4)}) == 1


def test_admission_takes_all_answers_or_none(folder: Path) -> None:
    """37 prompt tokens fill 2 pages; 20 new ones end in the fourth: 4 + 2 + 2 pages."""
    params = SamplingParams(max_tokens=20, n=3, ignore_eos=True)
    with opened(folder, folder.parent / "cache", kv_memory_bytes=12 * 16 * 1024) as loaded:
        engine = loaded.engine
        assert engine.scheduler.pool.pages == 12
        engine.add(Sequence(1, PROMPT, params))
        engine.add(Sequence(2, PROMPT, params))
        for _ in range(3):
            engine.step()
            engine.check()
            assert engine.scheduler.pool.used_pages == 8
            assert len(engine.scheduler.waiting) == 1
        engine.abort_all("test over")
        assert engine.scheduler.pool.used_pages == 0


def test_cancelling_a_request_ends_all_its_answers(folder: Path) -> None:
    params = SamplingParams(max_tokens=20, n=3, ignore_eos=True)
    with opened(folder, folder.parent / "cache") as loaded:
        request = Sequence(1, PROMPT, params)
        loaded.engine.add(request)
        loaded.engine.step()
        assert len(loaded.engine.scheduler.running) == 3
        loaded.engine.cancel(request)
        loaded.engine.check()
        assert loaded.engine.idle and loaded.engine.scheduler.pool.used_pages == 0
        assert loaded.engine.runner.held_sequences == 0


def test_more_answers_than_run_at_once_or_than_there_is_room_for_are_refused(folder: Path) -> None:
    with (
        opened(folder, folder.parent / "cache", max_running=4) as loaded,
        pytest.raises(BadParameter, match="n must be at most 4"),
    ):
        loaded.engine.validate(PROMPT, SamplingParams(n=5))
    with opened(folder, folder.parent / "cache", kv_memory_bytes=8 * 16 * 1024) as loaded:
        with pytest.raises(PromptTooLong, match="of KV for 3 answers"):
            loaded.engine.validate(PROMPT, SamplingParams(max_tokens=60, n=3))
        most = loaded.engine.most_new_tokens(len(PROMPT), 3)
        loaded.engine.validate(PROMPT, SamplingParams(max_tokens=most, n=3))
        with pytest.raises(PromptTooLong):
            loaded.engine.validate(PROMPT, SamplingParams(max_tokens=most + 1, n=3))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("max_step_tokens", [256, 16])
def test_prompts_are_scored_as_stock_scores_them(
    family: str, max_step_tokens: int, tmp_path: Path
) -> None:
    """Two prompts of different length in one step, and in chunks; `max_tokens` 0 and 1."""
    folder = tiny.build(family, tmp_path / "model")
    prompts = [PROMPT, PROMPT[5:14]]
    settings = {"max_step_tokens": max_step_tokens, "max_running": 4}
    with opened(folder, tmp_path / "cache", **settings) as loaded:
        requests = [
            Sequence(number, ids, SamplingParams(max_tokens=number, prompt_logprobs=1))
            for number, ids in enumerate(prompts)
        ]
        found = events_of(loaded, *requests)
    stock = tiny.oracle(folder)
    for number, ids in enumerate(prompts):
        scores = [score for event in found[number, 0] for score in event.prompt_logprobs]
        with torch.inference_mode():
            wanted = stock(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert [score.token_id for score in scores] == ids[1:]
        said = wanted[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        assert [score.logprob for score in scores] == pytest.approx(said.tolist(), abs=1e-4)
        best = wanted[:-1].max(-1)
        assert [score.top[0][1] for score in scores] == pytest.approx(
            best.values.tolist(), abs=1e-4
        )
        assert len(ids_of(found[number, 0])) == number


def test_a_stop_token_ends_and_is_not_text(folder: Path) -> None:
    with opened(folder, folder.parent / "cache") as loaded:
        greedy = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
        (whole,) = generate(loaded.engine, [PROMPT], greedy)
        stop = whole.ids[4]
        ending = SamplingParams(max_tokens=12, temperature=0.0, stop_token_ids=(stop,))
        (ended,) = generate(loaded.engine, [PROMPT], ending)
    assert ended.finish == "stop"
    assert ended.ids == whole.ids[: whole.ids.index(stop) + 1]
