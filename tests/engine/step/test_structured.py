"""Grammars inside the engine: every answer follows its own, whatever else it was asked for."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from engine_kit import generate, opened
from grammar_kit import check_valid
from moestro.engine import GrammarRefused, GrammarSpec, SamplingParams
from moestro.engine.loader import Loaded
from moestro.engine.step.sequence import Sequence
from schemas import FLAG, SCHEMAS, WHOLE, closed

PROMPT = [10, 20, 30]
DEEP = SCHEMAS["survey"]
GREEDY = SamplingParams(max_tokens=200, temperature=0.0)
AB = GrammarSpec("regex", "[ab]{3}!")
# its inner object meets llguidance's limits, but only when the answer gets there
LATE = closed({f"k{n}": FLAG for n in range(4)}) | {
    "properties": {
        **{f"k{n}": FLAG for n in range(4)},
        "wide": {"type": "object", "properties": {f"p{n}": WHOLE for n in range(1_000)}},
    },
    "required": [*(f"k{n}" for n in range(4)), "wide"],
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    folder = tiny.build("qwen3_moe", tmp_path_factory.mktemp("structured") / "model")
    with opened(folder, folder.parent / "cache", max_running=4) as engine:
        yield engine


def of(schema: object, **params: object) -> SamplingParams:
    return SamplingParams(
        **{"max_tokens": 300, "seed": 1, "grammar": GrammarSpec.of_schema(schema), **params}  # type: ignore[arg-type]
    )
