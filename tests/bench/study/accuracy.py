"""Multiple-choice questions by log-likelihood, many in one call.

A question's context is computed once; its continuations follow it side by side, each of which sees
the context and itself alone. Several questions share a row without seeing each other. Exact: a mask
and positions, no padding. Letters: T tokens of a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .cells import Values
from .questions import Question, best_choice
from .simulate import Sections, Simulation

ROW_TOKENS = 768


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids; the context is not empty."""

    context: list[int]
    continuations: list[list[int]]

    @property
    def tokens(self) -> int:
        return len(self.context) + sum(map(len, self.continuations))


@dataclass(frozen=True, slots=True)
class Row:
    """What one call reads, and where the continuations lie in it."""

    ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    sees: torch.Tensor  # [T, T] bool
    sections: Sections
    scored: list[list[list[int]]]  # [question][continuation] places of its tokens
    before: list[int]  # of each question, the place of the context's last token


def encode(tokenizer: Any, question: Question) -> Encoded:
    """Context and continuation as one text would be, cut where the context's tokens end."""
    context = tokenizer(question.context, add_special_tokens=False)["input_ids"]
    whole = [
        tokenizer(question.context + each, add_special_tokens=False)["input_ids"]
        for each in question.continuations
    ]
    return Encoded(context, [ids[len(context) :] for ids in whole])


def rows_of(encoded: Sequence[Encoded], most: int = ROW_TOKENS) -> Iterator[list[int]]:
    """Numbers of the questions that share a row, in order; a long one has its own."""
    held: list[int] = []
    tokens = 0
    for number, question in enumerate(encoded):
        if held and tokens + question.tokens > most:
            yield held
            held, tokens = [], 0
        held.append(number)
        tokens += question.tokens
    if held:
        yield held


def lay_out(questions: Sequence[Encoded]) -> Row:
    ids: list[int] = []
    positions: list[int] = []
    group: list[int] = []
    part: list[int] = []  # 0: the context, 1 …: a continuation
    scored: list[list[list[int]]] = []
    before = []
    for number, question in enumerate(questions):
        scored.append([])
        for place, tokens in enumerate([question.context, *question.continuations]):
            start = len(question.context) if place else 0
            if place:
                scored[-1].append(list(range(len(ids), len(ids) + len(tokens))))
            ids += tokens
            positions += range(start, start + len(tokens))
            group += [number] * len(tokens)
            part += [place] * len(tokens)
            if not place:
                before.append(len(ids) - 1)
    groups, parts, at = torch.tensor(group), torch.tensor(part), torch.arange(len(ids))
    same = groups[:, None] == groups
    sees = same & ((parts[:, None] == parts) | (parts == 0)) & (at[:, None] >= at)
    sections = Sections(groups, parts == 0)
    return Row(torch.tensor(ids), torch.tensor(positions), sees, sections, scored, before)


def log_likelihoods(simulation: Simulation, row: Row) -> list[list[float]]:
    """[question][continuation], in nats."""
    mask = torch.zeros(row.sees.shape).masked_fill(~row.sees, float("-inf"))
    hidden = simulation.hidden(
        row.ids,
        row.sections,
        attention_mask=mask[None, None],
        position_ids=row.positions[None],
    )
    found = []
    for last, continuations in zip(row.before, row.scored, strict=True):
        # a token is foretold where the one before it stands; a continuation's first, by the context
        readers = [place for each in continuations for place in [last, *each[:-1]]]
        wanted = row.ids[[place for each in continuations for place in each]]
        scores = simulation.logits(hidden[readers]).log_softmax(-1)
        picked = scores.gather(1, wanted[:, None])[:, 0]
        parts = torch.split(picked, [len(each) for each in continuations])
        found.append([float(part.sum()) for part in parts])
    return found


def measure_accuracy(
    simulation: Simulation, tokenizer: Any, questions: Sequence[Question]
) -> Values:
    """Right (1) or not (0), question by question, by both ways to compare continuations."""
    encoded = [encode(tokenizer, question) for question in questions]
    right: dict[str, list[str]] = {"raw": [], "per_character": []}
    for numbers in rows_of(encoded):
        row = lay_out([encoded[number] for number in numbers])
        for number, scores in zip(numbers, log_likelihoods(simulation, row), strict=True):
            question = questions[number]
            for metric, bits in right.items():
                choice = best_choice(scores, question.continuations, metric)
                bits.append("1" if choice == question.label else "0")
    bits_of = {metric: "".join(bits) for metric, bits in right.items()}
    return {**bits_of, "choices": "".join(str(len(q.continuations)) for q in questions)}
