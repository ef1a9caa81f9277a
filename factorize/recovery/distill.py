"""Teaches the student, end to end, to predict what the dense model predicts.

Low-rank deltas on gate, up and down learn (Hu et al., 2021, "LoRA"); the loss is the divergence of
the student's next-token distribution from the teacher's (Hinton et al., 2015). Routers stay as they
are: what a choice of experts costs has no derivative, and stand-ins for it were noise. The same
seed, steps and threads give the same result on one machine.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from moestro.engine import Progress, ProgressFn
from moestro.factorize.facts import FactorizeError

from .directions import begin_along_slopes
from .student import Student

TIMED_STEPS = 8  # before a bound in minutes becomes a number of steps
WARM_UP_STEPS = 15
CONSTANT_SHARE = 0.6  # of the steps; then the rates fall in a line
LEAST_RATE = 0.05  # of the full one, at the end
BETAS = (0.9, 0.98)
CLIP_NORM = 1.0
ROWS = 32  # of logits at a time
SLOPE_WINDOWS = 12  # that tell the directions in which deltas begin, twice
KEEP_STEPS = 20  # between two notes of where it stands


class Lesson(NamedTuple):
    """What one step practises: `top_k` experts, chosen by each token, or by the first half."""

    top_k: int
    by_prompt: bool = False


@dataclass(frozen=True, slots=True)
class DistillOptions:
    """All that the result depends on, beside the model, the plan, the texts and the threads."""

    steps: int | None = None  # None: as many as fit into the minutes
    minutes: float = 60.0
    lessons: tuple[Lesson, ...] = (Lesson(12), Lesson(12), Lesson(12), Lesson(6))  # in turns
    into_rate: float = 1e-3
    out_of_rate: float = 2e-4
    seed: int = 0
    goes_on: bool = False  # from deltas that are there: they begin where they are


@dataclass(slots=True)
class Distillation:
    """How far it has come: `done` of `steps`, the last losses by number of active experts."""

    student: Student
    optimizer: torch.optim.Optimizer
    rates: list[float]
    order: torch.Tensor  # of windows
    steps: int | None
    done: int = 0

    def scale_rates(self) -> None:
        share = self.done / self.steps if self.steps else 0.0
        scale = min(1.0, (self.done + 1) / WARM_UP_STEPS)
        if share > CONSTANT_SHARE:
            scale *= max(LEAST_RATE, (1 - share) / (1 - CONSTANT_SHARE))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * scale


class Kept(Protocol):
    """Where a run that was stopped goes on."""

    def keep(self, state: Distillation) -> None:
        """Notes where it stands."""

    def restore(self, state: Distillation) -> bool:
        """Sets `state` to what was noted; False where nothing was."""


def begin(student: Student, windows: int, options: DistillOptions) -> Distillation:
    groups = student.learning()
    rates = [options.out_of_rate, options.into_rate]
    parameters = [
        {"params": groups[name], "lr": rate}
        for name, rate in zip(("out_of", "into"), rates, strict=True)
    ]
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(windows, generator=generator)
    optimizer = torch.optim.Adam(parameters, betas=BETAS)
    return Distillation(student, optimizer, rates, order, options.steps)


def distill(
    student: Student,
    windows: torch.Tensor,
    options: DistillOptions,
    progress: ProgressFn,
    clock: Callable[[], float] = time.monotonic,
    kept: Kept | None = None,
) -> int:
    """Trains `student` on `windows` [N, S]; the steps done, those of a stopped run before included.

    Raises FactorizeError if it diverges.
    """
    first_s = clock()
    state = begin(student, len(windows), options)
    if not (kept is not None and kept.restore(state)) and not options.goes_on:
        _point(student, windows[state.order], options, progress)
        state = begin(student, len(windows), options)
    began_s, began = clock(), state.done
    while state.steps is None or state.done < state.steps:
        if state.steps is None and state.done == began + TIMED_STEPS:
            step_s = (clock() - began_s) / TIMED_STEPS
            left_s = 60 * options.minutes - (began_s - first_s)
            state.steps = max(began + TIMED_STEPS, int(left_s / max(step_s, 1e-6)))
            continue
        lesson = options.lessons[state.done % len(options.lessons)]
        window = windows[state.order[state.done % len(windows)]][None]
        loss = _step(state, window, lesson)
        _check_finite(loss, state.done)
        progress(Progress("distill", state.done, state.steps or 0, "steps"))
        if kept is not None and state.steps and state.done % KEEP_STEPS == 0:
            kept.keep(state)
    return state.done


def _check_finite(loss: float, done: int) -> None:
    """Raises FactorizeError."""
    if not math.isfinite(loss):
        raise FactorizeError(
            f"recovery diverged at step {done}: the loss is {loss}; give other texts"
        )


def _point(
    student: Student, windows: torch.Tensor, options: DistillOptions, progress: ProgressFn
) -> None:
    """Begins the deltas along the slopes of the last `windows` [N, S], which are read last."""
    told, lesson = windows[-SLOPE_WINDOWS:], options.lessons[0]
    done = 0

    def slopes() -> None:
        nonlocal done
        for window in told:
            progress(Progress("directions", done, 2 * len(told), "windows"))
            found, slope, loss = _slope(student, window[None], lesson)
            _check_finite(loss, 0)
            found.backward(slope)  # type: ignore[no-untyped-call]
            done += 1

    begin_along_slopes(student.parts(), slopes, options.seed)
    progress(Progress("directions", done, 2 * len(told), "windows"))


def _step(state: Distillation, window: torch.Tensor, lesson: Lesson) -> float:
    """The loss before it."""
    found, slope, loss = _slope(state.student, window, lesson)
    state.scale_rates()
    state.optimizer.zero_grad()
    found.backward(slope)  # type: ignore[no-untyped-call]
    everything = [p for group in state.optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(everything, CLIP_NORM)
    state.optimizer.step()
    state.done += 1
    return loss


def _slope(
    student: Student, window: torch.Tensor, lesson: Lesson
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(what the student found [T, H], the loss's slope by it, the loss) of one window [1, S].

    At all of its places, or at those behind a prompt that chose.
    """
    tokens = window.shape[1]
    prompt_tokens = tokens // 2 if lesson.by_prompt else None
    places = slice(prompt_tokens or 0, tokens - 1)
    with torch.no_grad():
        wanted = student.hidden(window, None)[0, places]
    found = student.hidden(window, lesson.top_k, prompt_tokens)[0, places]
    loss, slope = divergence(student, wanted, found.detach())
    return found, slope, loss


@torch.no_grad()
def divergence(
    student: Student, wanted: torch.Tensor, found: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """(the mean divergence of the tokens that `found` [T, H] predicts from those of `wanted`,

    its slope by `found`). Some rows at a time: their distributions stay in the processor's cache,
    and the slope of a softmax's divergence is the difference of the two.
    """
    total, slopes = 0.0, []
    for teacher, learner in zip(*(torch.split(x, ROWS) for x in (wanted, found)), strict=True):
        aim, said = student.log_probabilities(teacher), student.log_probabilities(learner)
        shares = aim.exp()
        total += float((shares * (aim - said)).sum())
        slopes.append(student.model.lm_head.back(said.exp_().sub_(shares)))
    return total / len(found), torch.cat(slopes) / len(found)
