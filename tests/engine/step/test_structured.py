"""Grammars inside the engine: every answer follows its own, whatever else it was asked for."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import pytest
from tokenizers import pre_tokenizers

import tiny
from engine_kit import Generation, generate, opened
from grammar_kit import check_valid
from moestro.engine import GrammarRefused, GrammarSpec, SamplingParams
from moestro.engine.loader import Loaded
from moestro.engine.step.sequence import Sequence
from schemas import SCHEMAS, WHOLE, closed

PROMPT = [10, 20, 30]
WHITE = [sorted(pre_tokenizers.ByteLevel.alphabet()).index(char) for char in "ĠĊĉ"]
AB = GrammarSpec("regex", "[ab]{3}!")
# its inner object meets llguidance's limits, and not before the answer gets there
WIDE = {"type": "object", "properties": {f"p{number}": WHOLE for number in range(1_000)}}
LATE = GrammarSpec.of_schema(closed({"first": {"const": "x" * 40}, "then": WIDE}))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    folder = tiny.build("qwen3_moe", tmp_path_factory.mktemp("structured") / "model")
    with opened(folder, folder.parent / "cache", max_running=4) as engine:
        yield engine


def drawn(grammar: GrammarSpec | None, seed: int = 1) -> SamplingParams:
    """Without white space, of which a random model makes a lot."""
    tight = tuple((token, -100.0) for token in WHITE)
    return SamplingParams(max_tokens=120, seed=seed, grammar=grammar, logit_bias=tight)


def one(loaded: Loaded, params: SamplingParams) -> Generation:
    return generate(loaded.engine, [PROMPT], params)[0]


def answers(loaded: Loaded, *requests: Sequence) -> dict[tuple[int, int], Generation]:
    """By request and answer."""
    found: dict[tuple[int, int], Generation] = defaultdict(Generation)
    for request in requests:
        loaded.engine.add(request)
    while not loaded.engine.idle:
        for sequence, event in loaded.engine.step():
            answer = found[sequence.number, event.index]
            answer.ids += event.token_ids
            answer.text += event.text
            if event.finish_reason is not None:
                answer.finish, answer.error = event.finish_reason.value, event.error
        loaded.engine.check()
    return found


@pytest.mark.parametrize("name", ["clock", "tags", "nullable", "tree", "hexadecimal"])
def test_answers_are_valid_and_end_by_themselves(loaded: Loaded, name: str) -> None:
    found = one(loaded, drawn(GrammarSpec.of_schema(SCHEMAS[name])))
    assert found.finish == "stop"
    check_valid(SCHEMAS[name], found.text)


def test_the_same_seed_gives_the_same_answer(loaded: Loaded) -> None:
    schema = GrammarSpec.of_schema(SCHEMAS["clock"])
    texts = [one(loaded, drawn(schema, seed)).text for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_each_of_several_answers_follows_a_state_of_its_own(loaded: Loaded) -> None:
    schema = SCHEMAS["clock"]
    params = replace(drawn(GrammarSpec.of_schema(schema)), n=3)
    found = answers(loaded, Sequence(1, PROMPT, params))
    assert len({answer.text for answer in found.values()}) == 3
    for answer in found.values():
        check_valid(schema, answer.text)
        assert answer.finish == "stop"


def test_a_grammar_that_was_put_out_is_not_needed_by_what_runs(loaded: Loaded) -> None:
    params = replace(drawn(AB), n=2)
    request = Sequence(1, PROMPT, params)
    loaded.engine.add(request)
    kept = loaded.tokenizer.grammars
    compiled = kept.compile(AB)
    kept._kept.clear()
    texts: dict[int, str] = defaultdict(str)
    while not loaded.engine.idle:
        for _, event in loaded.engine.step():
            texts[event.index] += event.text
    assert all(re.fullmatch("[ab]{3}!", texts[index]) for index in range(2))
    assert AB not in kept._kept and kept.compile(AB) is not compiled


@pytest.mark.parametrize(
    "asked",
    [
        {"ignore_eos": True, "skip_special_tokens": False},
        {"min_tokens": 100},
        {"logit_bias": ((256, -100.0), (33, -100.0))},
        {"temperature": 0.0},
        {"stop_token_ids": (7,), "min_tokens": 1},
    ],
    ids=str,
)
def test_what_else_is_asked_for_neither_breaks_nor_outlives_it(
    loaded: Loaded, asked: dict[str, object]
) -> None:
    found = one(loaded, replace(drawn(AB), **asked))  # type: ignore[arg-type]
    assert re.fullmatch("[ab]{3}!", found.text) and found.finish == "stop"
    assert len(found.ids) == 4, "no stop token is waited for"


def test_the_end_may_be_chosen_where_more_could_follow(loaded: Loaded) -> None:
    """And then it is the end even for `ignore_eos`; before `min_tokens` it is not chosen."""
    to_end = ((256, 100.0),)
    params = replace(drawn(GrammarSpec("regex", "a+")), logit_bias=to_end, include_stop=False)
    for ignores in (False, True):
        found = one(loaded, replace(params, ignore_eos=ignores, skip_special_tokens=False))
        assert (found.text, found.ids[-1], found.finish) == ("a", 256, "stop")
    found = one(loaded, replace(params, min_tokens=5))
    assert (found.text, found.finish) == ("aaaaa", "stop")


def test_nothing_is_an_answer_too(loaded: Loaded) -> None:
    """Not even `min_tokens` can be had where the end is all that may come."""
    found = one(loaded, replace(drawn(GrammarSpec("regex", "")), min_tokens=3))
    assert (found.text, found.finish, found.error) == ("", "stop", None)


def test_max_tokens_cuts_it_off(loaded: Loaded) -> None:
    found = one(loaded, replace(drawn(AB), max_tokens=2))
    assert re.fullmatch("[ab]{2}", found.text) and found.finish == "length"


def test_a_fault_ends_one_request_alone(loaded: Loaded) -> None:
    alone = one(loaded, drawn(AB, seed=5))
    free = one(loaded, replace(drawn(None), max_tokens=30, ignore_eos=True))
    corrupted = loaded.engine.counters.corrupted
    found = answers(
        loaded,
        Sequence(1, PROMPT, replace(drawn(LATE), n=2)),
        Sequence(2, PROMPT, drawn(AB, seed=5)),
        Sequence(3, PROMPT, replace(drawn(None), max_tokens=30, ignore_eos=True)),
    )
    failed = [answer for (number, _), answer in found.items() if number == 1 and answer.error]
    assert len(failed) == 1 and "the grammar cannot go on" in str(failed[0].error)
    assert failed[0].text.startswith("{") and failed[0].finish == "error"
    assert (found[2, 0].text, found[2, 0].finish) == (alone.text, "stop")
    assert found[3, 0].ids == free.ids
    assert loaded.engine.counters.corrupted == corrupted
    assert one(loaded, drawn(AB, seed=5)).text == alone.text, "the next one is as ever"


def test_a_grammar_that_is_refused_leaves_nothing_behind(loaded: Loaded) -> None:
    with pytest.raises(GrammarRefused):
        loaded.engine.add(Sequence(1, PROMPT, drawn(GrammarSpec("regex", "("))))
    loaded.engine.check()
    assert loaded.engine.idle
