"""Answers of the demo model held to JSON schemas, many at once: each that finishes is valid."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine_kit import MIB, generate_each, opened
from grammar_kit import check_valid
from moestro.engine import GrammarRefused, GrammarSpec, SamplingParams
from moestro.engine.loader import Loaded
from moestro.factorize import prepare_demo
from schemas import HUGE, IMPOSSIBLE, SCHEMAS, UNSUPPORTED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MOST_TOKENS = 160
LEAST_FINISHED = 0.8
AT_ONCE = 16


@pytest.fixture(scope="module")
def loaded() -> Iterator[Loaded]:
    cache_dir = Path(os.environ.get("MOESTRO_CACHE_DIR", Path.home() / ".cache" / "moestro"))
    demo = prepare_demo(cache_dir, lambda _: None)
    settings: Any = {"kv_memory_bytes": 128 * MIB, "max_running": AT_ONCE, "threads": 1}
    with opened(demo, cache_dir, max_waiting=len(SCHEMAS), **settings) as engine:
        yield engine


def asked(loaded: Loaded, name: str) -> list[int]:
    """Without the schema: what is valid is the grammar's doing."""
    question = f"Give a short example of: {name.replace('_', ' ')}, as JSON."
    text = loaded.tokenizer.render_chat(
        [{"role": "user", "content": question}],
        tools=None,
        add_generation_prompt=True,
        continue_final_message=False,
        kwargs={},
    )
    return loaded.tokenizer.encode(text, add_special_tokens=False)


def held_to(schema: Any, seed: int) -> SamplingParams:
    """Every third greedily. So small a model repeats digits and white space without end: less so
    where it is penalized.
    """
    return SamplingParams(
        max_tokens=MOST_TOKENS,
        temperature=0.7 if seed % 3 else 0.0,
        frequency_penalty=1.0,
        seed=seed,
        grammar=GrammarSpec.of_schema(schema),
    )


def test_every_finished_answer_is_valid(loaded: Loaded) -> None:
    requests = [
        (asked(loaded, name), held_to(schema, seed))
        for seed, (name, schema) in enumerate(SCHEMAS.items())
    ]
    answers = dict(zip(SCHEMAS, generate_each(loaded.engine, requests), strict=True))
    assert {answer.finish for answer in answers.values()} <= {"stop", "length"}, answers
    finished = {name: answer for name, answer in answers.items() if answer.finish == "stop"}
    for name, answer in finished.items():
        check_valid(SCHEMAS[name], answer.text)
    unfinished = {name: answers[name].text for name in answers.keys() - finished.keys()}
    assert len(SCHEMAS) >= 50
    assert len(finished) >= LEAST_FINISHED * len(SCHEMAS), unfinished


@pytest.mark.parametrize("name", [*IMPOSSIBLE, *UNSUPPORTED, *HUGE])
def test_what_cannot_be_held_is_refused(name: str, loaded: Loaded) -> None:
    told = {key: schema for key, (schema, _) in (IMPOSSIBLE | UNSUPPORTED).items()} | HUGE
    with pytest.raises(GrammarRefused):
        loaded.tokenizer.grammars.compile(GrammarSpec.of_schema(told[name]))
