"""Whatever a grammar lets a model say, when it has ended, is what was asked for."""

import json
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as FastTokenizer

import tiny_tokenizers
from grammar_kit import PADDING, check_valid, text_of, tokenizers_size, walk
from moestro.engine import GrammarRefused, GrammarSpec, QueueFull, Tokenizer
from moestro.engine.text import CompiledGrammar, GrammarConstraint, GrammarFault, Grammars
from moestro.engine.text.grammar import GrammarLimits
from moestro.engine.text.vocabulary import Vocabulary
from schemas import HUGE, IMPOSSIBLE, SCHEMAS, UNSUPPORTED, WHOLE

BYTES = tuple(tiny_tokenizers.BY_BYTES)
FLAG = GrammarSpec.of_schema({"type": "boolean"})


def byte_level() -> Tokenizer:
    return tiny_tokenizers.opened("byte_level")


def fresh(**limits: Any) -> Grammars:
    fast = tiny_tokenizers.byte_level()
    return Grammars(fast, Vocabulary(fast), byte_level().stop_ids, GrammarLimits(**limits))


def allowed(constraint: GrammarConstraint, size: int) -> set[int]:
    logits = np.zeros(size, np.float32)
    constraint.forbid(logits)
    return set(np.flatnonzero(logits == 0).tolist())


def say(constraint: GrammarConstraint, tokenizer: Tokenizer, text: str) -> None:
    for token in tokenizer.encode(text, add_special_tokens=False):
        constraint.advance(token)


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_a_schema_allows_is_valid(name: str) -> None:
    """One kind of tokenizer after another, so that each sees a good part of the schemas."""
    start = list(SCHEMAS).index(name)
    for seed in range(3):
        tokenizer = tiny_tokenizers.opened(BYTES[(start + seed) % len(BYTES)])
        ids = walk(tokenizer, GrammarSpec.of_schema(SCHEMAS[name]), seed)
        check_valid(SCHEMAS[name], text_of(tokenizer, ids))


def test_there_are_fifty_schemas_and_the_check_sees_what_is_not_valid() -> None:
    assert len(SCHEMAS) >= 50
    for name, text in (("weather", "{}"), ("identified", '{"id":"x"}'), ("bare_number", "7.5")):
        with pytest.raises(Exception, match=r"required|uuid|maximum"):
            check_valid(SCHEMAS[name], text)


@pytest.mark.parametrize("kind", BYTES)
def test_json_objects_choices_expressions_and_lark(kind: str) -> None:
    tokenizer = tiny_tokenizers.opened(kind)
    choices = ['a "b"', "c\\d\n", "é😀\x00", " a", "<call>", tiny_tokenizers.EOS]
    for seed in range(6):
        found = text_of(tokenizer, walk(tokenizer, GrammarSpec("json_object"), seed))
        assert isinstance(json.loads(found), dict)
        found = text_of(tokenizer, walk(tokenizer, GrammarSpec.of_choices(choices), seed))
        assert found in choices
        found = text_of(tokenizer, walk(tokenizer, GrammarSpec("regex", "(ab|é){2,3}[.!]"), seed))
        assert re.fullmatch("(ab|é){2,3}[.!]", found)
        lark = GrammarSpec("lark", 'start: "a" (" b")+ "."')
        assert re.fullmatch(r"a( b)+\.", text_of(tokenizer, walk(tokenizer, lark, seed)))


def test_forced_text_is_spelled_as_the_model_would() -> None:
    tokenizer = byte_level()
    spec = GrammarSpec.of_choices(["abab"])
    assert walk(tokenizer, spec) == tokenizer.encode("abab", add_special_tokens=False)
    assert len(walk(tokenizer, spec)) == 2
    tokenizer = tiny_tokenizers.opened("sentencepiece")  # writes a space before what it encodes
    space, *learned = tokenizer.encode("x  ab", add_special_tokens=False)
    assert (tokenizer.token_bytes(space), tokenizer.token_bytes(learned[-1])) == (b" ", b" ab")
    assert walk(tokenizer, GrammarSpec.of_choices(["x  ab"])) == learned, "not by the longest"


def test_markers_are_never_text_and_the_end_comes_where_it_may() -> None:
    tokenizer = byte_level()
    size = tokenizers_size(tokenizer)
    (stop,) = tokenizer.stop_ids
    markers = {size - 3, size - 2, size - 1}
    assert stop in markers
    constraint = tokenizer.grammars.compile(GrammarSpec.of_schema({"type": "string"})).constraint()
    say(constraint, tokenizer, '"x')
    inside = allowed(constraint, size)
    assert len(inside) > 50 and not inside & markers
    constraint = tokenizer.grammars.compile(GrammarSpec("regex", "a+")).constraint()
    assert stop not in allowed(constraint, size)
    say(constraint, tokenizer, "a")
    assert allowed(constraint, size) & markers == {stop} and not constraint.finished
    constraint.advance(stop)
    assert constraint.finished


def test_all_stop_tokens_end_it_and_none_is_needed() -> None:
    fast = tiny_tokenizers.byte_level()
    size = fast.get_vocab_size()
    ids = fast.get_vocab()
    x, word, y = (ids[piece] for piece in ("x", "ab", "y"))
    for stops in ({size - 1, size - 2, word}, set[int](), {size + 100}):
        grammars = Grammars(fast, Vocabulary(fast), frozenset(stops))
        start = grammars.compile(GrammarSpec("regex", "ab!")).constraint()
        assert (word in allowed(start, size)) == (word not in stops)
        constraint = grammars.compile(GrammarSpec("regex", "x(ab)?y?")).constraint()
        constraint.advance(x)
        found = allowed(constraint, size + PADDING)
        assert found - stops == {ids["a"], y} | ({word} - stops)
        assert found & stops == {stop for stop in stops if stop < size}
        constraint.advance(word)
        assert constraint.finished == (word in stops)
        if not constraint.finished:
            constraint.advance(y)
            assert constraint.finished


def test_a_model_may_have_more_or_fewer_logits_than_there_are_tokens() -> None:
    tokenizer = byte_level()
    constraint = tokenizer.grammars.compile(GrammarSpec("regex", "[!~]")).constraint()
    bang, tilde = (tokenizer.encode(one, add_special_tokens=False)[0] for one in "!~")
    assert allowed(constraint, 4000) == {bang, tilde}
    assert allowed(constraint, tilde) == {bang}
    with pytest.raises(GrammarFault, match="no token of this model"):
        allowed(constraint, bang)


def test_a_token_against_the_grammar_is_a_fault_for_good() -> None:
    tokenizer = byte_level()
    compiled = tokenizer.grammars.compile(FLAG)
    broken, healthy = compiled.constraint(), compiled.constraint()
    with pytest.raises(GrammarFault, match="cannot go on"):
        say(broken, tokenizer, "x")
    with pytest.raises(GrammarFault):
        allowed(broken, 300)
    say(healthy, tokenizer, "true")
    assert healthy.finished


def test_white_space_comes_to_an_end() -> None:
    tokenizer = byte_level()
    constraint = tokenizer.grammars.compile(GrammarSpec("json_object")).constraint()
    (newline,) = tokenizer.encode("\n", add_special_tokens=False)
    (space,) = tokenizer.encode(" ", add_special_tokens=False)
    say(constraint, tokenizer, "{")
    constraint.advance(newline)
    for _ in range(64):
        assert space in allowed(constraint, 300)
        constraint.advance(space)
    assert not {newline, space} & allowed(constraint, 300)


@pytest.mark.parametrize("name", [*IMPOSSIBLE, *UNSUPPORTED])
def test_what_cannot_be_kept_to_is_refused_in_words(name: str) -> None:
    schema, words = (IMPOSSIBLE | UNSUPPORTED)[name]
    with pytest.raises(GrammarRefused, match=words) as caught:
        byte_level().grammars.compile(GrammarSpec.of_schema(schema))
    assert caught.value.param == "response_format"
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 450


@pytest.mark.parametrize("name", HUGE)
def test_what_is_too_large_is_refused(name: str) -> None:
    with pytest.raises(GrammarRefused, match=r"at most 131072|max is 2000|too large"):
        byte_level().grammars.compile(GrammarSpec.of_schema(HUGE[name]))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (GrammarSpec("json_schema", "{"), "cannot be kept to"),
        (GrammarSpec("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000), "recursion"),
        (GrammarSpec("regex", "(a"), "unclosed group"),
        (GrammarSpec("regex", "("), "unclosed"),
        (GrammarSpec("regex", "(" * 5000 + "a" + ")" * 5000), "cannot be kept to"),
        (GrammarSpec("regex", r"[^\s\S]"), "nothing that this model can say"),
        (GrammarSpec("regex", "(((a{100}){100}){100}){100}"), "too many expressions"),
        (GrammarSpec("choice", "[]"), "no choices"),
        (GrammarSpec.of_choices(["\ud800"]), "surrogates"),
        (GrammarSpec("lark", "start: nobody"), "nobody"),
    ],
    ids=lambda part: "",
)
def test_what_is_no_grammar_is_refused(spec: GrammarSpec, words: str) -> None:
    with pytest.raises(GrammarRefused, match=words):
        byte_level().grammars.compile(spec)


def test_what_is_no_json_is_refused_before_it_is_a_grammar() -> None:
    endless: list[Any] = []
    endless.append(endless)
    for schema in ({"const": float("nan")}, {"enum": endless}, {"const": {1, 2}}):
        with pytest.raises(GrammarRefused, match="no JSON"):
            GrammarSpec.of_schema(schema)


def test_a_schema_cannot_loosen_its_own_rules() -> None:
    schema = {"type": "array", "items": WHOLE, "minItems": 2, "maxItems": 2}
    asks = {"lenient": True, "item_separator": ";", "whitespace_pattern": "x"}
    ids = walk(byte_level(), GrammarSpec.of_schema(schema | {"x-guidance": asks}))
    check_valid(schema, text_of(byte_level(), ids))
    with pytest.raises(GrammarRefused, match="uniqueItems"):
        byte_level().grammars.compile(
            GrammarSpec.of_schema(schema | {"uniqueItems": True, "x-guidance": asks})
        )


@pytest.mark.parametrize("kind", tiny_tokenizers.BY_WINDOWS)
def test_a_tokenizer_that_cannot_spell_json_is_refused(kind: str) -> None:
    with pytest.raises(GrammarRefused, match="tokenizer has no token for each character"):
        tiny_tokenizers.opened(kind).grammars.compile(FLAG)


def test_tokens_that_hang_on_their_neighbours_are_refused_even_if_they_spell_json() -> None:
    whole = json.loads(tiny_tokenizers.byte_level().to_str())
    vocab = whole["model"]["vocab"]
    vocab[" "] = vocab.pop("Ġ")
    whole["decoder"] = {"type": "BPEDecoder", "suffix": "</w>"}
    fast = FastTokenizer.from_str(json.dumps(whole))
    assert Vocabulary(fast).bytes_of(vocab[" "]) == b" "
    with pytest.raises(GrammarRefused, match="tokenizer has no token for each character"):
        Grammars(fast, Vocabulary(fast), frozenset()).compile(FLAG)


def test_few_grammars_are_kept_and_the_last_used_ones() -> None:
    grammars = fresh(most_kept=2)
    specs = [GrammarSpec("regex", letter) for letter in "abc"]
    first, second = (grammars.compile(spec) for spec in specs[:2])
    assert grammars.compile(specs[0]) is first
    grammars.compile(specs[2])
    assert grammars.compile(specs[0]) is first
    assert grammars.compile(specs[1]) is not second


def test_the_texts_that_are_kept_have_a_limit() -> None:
    grammars = fresh(most_kept_bytes=10)
    first = grammars.compile(GrammarSpec("regex", "é" * 4))
    assert grammars.compile(GrammarSpec("regex", "é" * 4)) is first
    grammars.compile(GrammarSpec("regex", "abc"))
    assert grammars.compile(GrammarSpec("regex", "é" * 4)) is not first
    alone = GrammarSpec("regex", "a" * 11)
    assert grammars.compile(alone) is not grammars.compile(alone), "is not kept at all"


def test_one_that_takes_too_long_is_given_up_and_keeps_its_place_till_it_ends() -> None:
    grammars = fresh(compile_s=0.0, most_compiling=2)
    done = threading.Event()
    compiled = byte_level().grammars.compile(FLAG)

    def stuck() -> CompiledGrammar:
        done.wait()
        return compiled

    before = set(threading.enumerate())
    for _ in range(2):
        with pytest.raises(GrammarRefused, match="took more than 0 s"):
            grammars._in_time(stuck)
    waiting = set(threading.enumerate()) - before
    assert len(waiting) == 2 and all(thread.daemon for thread in waiting)
    with pytest.raises(QueueFull, match="try again later"):
        grammars.compile(FLAG)
    done.set()
    for thread in waiting:
        thread.join()
    grammars._limits = GrammarLimits()
    grammars.compile(FLAG)


def test_a_compilation_that_dies_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    died = list[object]()
    monkeypatch.setattr(threading, "excepthook", died.append)
    grammars = fresh(compile_s=1e6, most_compiling=1)
    before = set(threading.enumerate())

    def dies() -> CompiledGrammar:
        raise KeyError("planted")

    for _ in range(2):  # its place is free again
        with pytest.raises(GrammarRefused, match="could not be compiled"):
            grammars._in_time(dies)
    for thread in set(threading.enumerate()) - before:
        thread.join()
    assert len(died) == 2


def test_many_threads_compile_at_once() -> None:
    grammars, found = fresh(), list[CompiledGrammar]()
    specs = [GrammarSpec("regex", f"a{{{number}}}") for number in range(1, 5)]
    work = [
        threading.Thread(target=lambda spec=spec: found.append(grammars.compile(spec)))
        for spec in specs * 3
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(found) == 12 and len(set(map(id, map(grammars.compile, specs)))) == 4


def test_ids_without_a_token_are_no_text(tmp_path: Path) -> None:
    whole = json.loads(tiny_tokenizers.byte_level().to_str())
    whole["model"]["vocab"]["ab"] = 400
    tokenizer = tiny_tokenizers.open_fast(FastTokenizer.from_str(json.dumps(whole)), tmp_path)
    assert not tokenizer.token_bytes(300)
    constraint = tokenizer.grammars.compile(GrammarSpec("regex", ".*")).constraint()
    found = allowed(constraint, 400 + PADDING)
    assert {*range(260, 400 + PADDING)} & found == {*tokenizer.stop_ids, 400}
