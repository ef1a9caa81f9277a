"""One step at a time: what ends a sequence, and what it leaves behind."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from engine_kit import generate, opened
from moestro.cache import PackInvalid, ReadFailed
from moestro.engine import BadParameter, PromptTooLong, QueueFull, SamplingParams
from moestro.engine.loader import Loaded, _discard
from moestro.engine.step.core import MOST_UNREAD_STEPS, STEP_FAILED, Engine
from moestro.engine.step.runner import Ran
from moestro.engine.step.sequence import Sequence

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("qwen3_moe", tmp_path_factory.mktemp("core") / "model")


@pytest.fixture
def loaded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    with opened(folder, folder.parent / "cache", max_running=2, max_waiting=4) as opened_engine:
        yield opened_engine


def test_more_prompts_than_places_all_end_as_if_alone(loaded: Loaded) -> None:
    prompts = [[10 + i, 20 + i, 30 + i] for i in range(4)]
    together = [generation.ids for generation in generate(loaded.engine, prompts, GREEDY)]
    alone = [generate(loaded.engine, [prompt], GREEDY)[0].ids for prompt in prompts]
    assert together == alone
    assert all(len(ids) == 12 for ids in together)


def test_length_and_end_of_sequence_and_stop_strings(loaded: Loaded) -> None:
    whole = generate(loaded.engine, [[10, 20, 30]], GREEDY)[0]
    assert whole.finish == "length"
    marker = whole.ids[5]
    loaded.tokenizer.stop_ids = frozenset({marker})
    first = whole.ids.index(marker)
    ended = generate(loaded.engine, [[10, 20, 30]], SamplingParams(max_tokens=12, temperature=0.0))
    assert ended[0].finish == "stop"
    assert ended[0].ids == whole.ids[: first + 1]
    ignoring = generate(loaded.engine, [[10, 20, 30]], GREEDY)[0]
    assert ignoring.ids == whole.ids


def test_a_cancelled_sequence_is_gone_before_the_next_step(loaded: Loaded) -> None:
    engine = loaded.engine
    staying, leaving = Sequence(1, [1, 2], GREEDY), Sequence(2, [3, 4], GREEDY)
    engine.add(staying)
    engine.add(leaving)
    engine.step()
    event = engine.cancel(leaving)
    assert event is not None and event.finish_reason is not None
    assert event.finish_reason.value == "abort"
    assert [sequence.number for sequence, _ in engine.step()] == [1]
    assert engine.cancel(leaving) is None, "a second cancel does nothing"
    engine.check()
    engine.cancel(staying)
    assert engine.idle and engine.scheduler.kv_reserved_bytes == 0
    assert engine.runner.held_sequences == 0


def test_a_cancelled_waiting_sequence_never_runs(loaded: Loaded) -> None:
    engine = loaded.engine
    sequences = [Sequence(number, [1, 2], GREEDY) for number in range(3)]
    for sequence in sequences:
        engine.add(sequence)
    engine.step()  # two run, one waits
    engine.cancel(sequences[2])
    engine.check()
    for sequence in sequences[:2]:
        engine.cancel(sequence)
    assert engine.idle


def test_bad_requests_are_refused_before_they_enter(loaded: Loaded) -> None:
    engine = loaded.engine
    with pytest.raises(BadParameter, match="empty"):
        engine.validate([], GREEDY)
    for bad in (-1, 260):
        with pytest.raises(BadParameter, match=r"outside 0\.\.259"):
            engine.validate([1, bad], GREEDY)
    with pytest.raises(PromptTooLong, match="maximum context length is 512 tokens"):
        engine.validate([1] * 501, GREEDY)
    engine.validate([1] * 500, GREEDY)


def test_a_full_queue_leaves_nothing_behind(loaded: Loaded) -> None:
    engine = loaded.engine
    for number in range(4):
        engine.add(Sequence(number, [1], GREEDY))
    with pytest.raises(QueueFull):
        engine.add(Sequence(4, [1], GREEDY))
    engine.check()
    engine.abort_all("test over")
    assert engine.idle


def test_logits_that_are_not_finite_end_one_request_alone(loaded: Loaded) -> None:
    engine = loaded.engine
    run = engine.runner.run

    class Poisoned:
        """The real runner, whose second row turns to NaN."""

        held_sequences = 0
        selection = None
        forget = staticmethod(engine.runner.forget)

        @staticmethod
        def run(batch: object) -> Ran:
            logits = run(batch).logits.clone()  # type: ignore[arg-type]
            if len(logits) == 2:
                logits[1] = float("nan")
            return Ran(logits)

    healthy = generate(engine, [[1, 2, 3]], GREEDY)[0]
    engine.runner = Poisoned()  # type: ignore[assignment]
    good, bad = generate(engine, [[1, 2, 3], [4, 5, 6]], GREEDY)
    assert good.ids == healthy.ids
    assert (bad.finish, bad.ids) == ("error", [])
    assert bad.error is not None and "not finite" in bad.error
    assert engine.counters.corrupted == 1


@pytest.mark.parametrize("error", [ReadFailed("no"), RuntimeError("no"), MemoryError("no")])
def test_a_failed_step_ends_its_requests_and_the_engine_goes_on(
    error: Exception, loaded: Loaded
) -> None:
    healthy = generate(loaded.engine, [[1, 2, 3]], GREEDY)[0]
    loaded.engine.runner = FailingOnce(loaded.engine, error)  # type: ignore[assignment]
    failed = generate(loaded.engine, [[1, 2, 3]], GREEDY)[0]
    assert failed.finish == "error" and failed.error == STEP_FAILED
    assert generate(loaded.engine, [[1, 2, 3]], GREEDY)[0].ids == healthy.ids


def test_a_damaged_pack_is_taken_away_for_the_next_start(folder: Path) -> None:
    cache_dir = folder.parent / "damaged"
    with opened(folder, cache_dir) as loaded:
        (pack,) = cache_dir.rglob("*.pack")
        loaded.engine.runner = FailingOnce(loaded.engine, PackInvalid("bits"))  # type: ignore[assignment]
        assert generate(loaded.engine, [[1, 2, 3]], GREEDY)[0].finish == "error"
        assert not pack.exists()
        assert f"{pack} was removed: start again" in str(loaded.engine.lost)
    with opened(folder, cache_dir) as loaded:
        assert generate(loaded.engine, [[1, 2, 3]], GREEDY)[0].finish == "length"


def test_reads_that_fail_step_after_step_lose_the_pack(loaded: Loaded) -> None:
    engine = loaded.engine

    def fail_once() -> None:
        engine.runner = FailingOnce(engine, ReadFailed("no"))  # type: ignore[assignment]
        assert generate(engine, [[1, 2, 3]], GREEDY)[0].finish == "error"

    for _ in range(MOST_UNREAD_STEPS - 1):
        fail_once()
    generate(engine, [[1, 2, 3]], GREEDY)  # a request that ends well begins the count anew
    for _ in range(MOST_UNREAD_STEPS):
        assert engine.lost is None
        unfinished = Sequence(9, [1, 2], GREEDY)
        engine.add(unfinished)
        engine.step()  # a step that goes well proves little: it may have read nothing
        engine.cancel(unfinished)
        fail_once()
    assert "no; 3 steps failed so and no request ended well" in str(engine.lost)
    engine.lost = None


def test_a_damaged_pack_that_cannot_be_removed_is_named(tmp_path: Path) -> None:
    (tmp_path / "pack" / "inside").mkdir(parents=True)  # unlink fails on a folder
    assert "could not be removed" in _discard(tmp_path / "pack")


class FailingOnce:
    """A real runner whose next step fails."""

    def __init__(self, engine: Engine, error: Exception) -> None:
        self._engine, self._error, self._real = engine, error, engine.runner
        self.held_sequences = 0
        self.selection = None
        self.forget = engine.runner.forget

    def run(self, _: object) -> Ran:
        self._engine.runner = self._real
        raise self._error


def test_an_error_in_one_requests_choice_ends_that_request_alone(loaded: Loaded) -> None:
    engine = loaded.engine
    healthy = generate(engine, [[1, 2, 3]], GREEDY)[0]
    good, bad = Sequence(1, [1, 2, 3], GREEDY), Sequence(2, [4, 5, 6], GREEDY)
    engine.add(good)
    engine.add(bad)

    class Broken:
        """A text stream that fails."""

        @staticmethod
        def push(_: int) -> str:
            raise ZeroDivisionError

    engine._outputs[2, 0] = replace(engine._outputs[2, 0], text=Broken())  # type: ignore[arg-type]
    ends = {}
    ids: list[int] = []
    while not engine.idle:
        for sequence, event in engine.step():
            ids += event.token_ids if sequence is good else ()
            if event.finish_reason is not None:
                ends[sequence.number] = event.finish_reason.value
    assert ends == {1: "length", 2: "error"}
    assert ids == healthy.ids


def test_tokens_are_counted_once(folder: Path) -> None:
    with opened(folder, folder.parent / "cache", max_step_tokens=16) as loaded:
        generate(loaded.engine, [[1] * 40, [2] * 3], GREEDY)
        stats = loaded.stats()
    assert stats.prompt_tokens == 43
    assert stats.generation_tokens == 24
    assert stats.requests_finished == {"stop": 0, "length": 2, "abort": 0, "error": 0}
    assert stats.kv_used_bytes == 0


@pytest.mark.parametrize("kv_tokens", [64, 100, 130, 256])
def test_whatever_is_accepted_is_served(kv_tokens: int, folder: Path) -> None:
    """Reservations are rounded; the longest request that fits must still be admitted."""
    cache_dir = folder.parent / "cache"
    with opened(folder, cache_dir, kv_memory_bytes=kv_tokens * 1024) as loaded:
        engine = loaded.engine
        assert engine.max_model_len_tokens == kv_tokens // 16 * 16
        for total in {2, 63, 64, engine.max_model_len_tokens}:
            params = SamplingParams(max_tokens=1, temperature=0.0)
            prompt = [1] * (total - 1)
            engine.validate(prompt, params)
            assert generate(engine, [prompt], params)[0].finish == "length"


def test_a_request_that_could_never_be_admitted_is_refused(loaded: Loaded) -> None:
    with pytest.raises(PromptTooLong, match="bytes of KV"):
        loaded.engine.scheduler.add(Sequence(1, [1] * 100_000, GREEDY))
    assert loaded.engine.idle


@pytest.mark.parametrize("temperature", [1e-310, 1e-40, 1e-6, 1e-4, 1e-3])
def test_a_tiny_temperature_is_nearly_greedy_and_harms_nobody(
    temperature: float, loaded: Loaded
) -> None:
    greedy = generate(loaded.engine, [[1, 2, 3]], GREEDY)[0].ids
    cold = SamplingParams(max_tokens=12, temperature=temperature, seed=1, ignore_eos=True)
    assert generate(loaded.engine, [[1, 2, 3]], cold)[0].ids == greedy
