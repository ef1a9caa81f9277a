"""Recovery as one stage: from a plan to deltas of the weights, and the plan that tells of them."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moestro.engine import ProgressFn
from moestro.factorize.facts import (
    BITS,
    PARTS,
    DeltaFacts,
    Deltas,
    FactorizeError,
    Plan,
    low_rank,
)

from .distill import DistillOptions, Lesson, distill
from .kept import KeptFile
from .repair import RepairOptions, repair
from .student import Student

STAGES = ("repair", "lora")
MODES = ("token", "sequence")
RANK = 5
RECIPE = 3  # counts the ways a distillation has been done: a kept one of another does not go on


@dataclass(frozen=True, slots=True)
class RecoverOptions:
    """Which stages, and how long: `minutes` bound the distillation, or `steps` do, exactly."""

    stages: tuple[str, ...] = STAGES
    minutes: float = 60.0
    steps: int | None = None
    tokens: int = 65_536  # of the texts; each is read at least once by the repair
    rank: int | None = None  # of the low-rank deltas; None: as they are, or RANK
    seed: int = 0
    modes: tuple[str, ...] = ("token",)  # who chooses the experts where it is practised
    bits: int = 8  # of a number of the low-rank deltas

    @property
    def by_prompt(self) -> bool:
        """Only what prompts choose is practised: then layers are measured under that, too."""
        return self.modes == ("sequence",)

    def check(self) -> None:
        """Raises FactorizeError."""
        unknown = sorted(set(self.stages) - set(STAGES))
        if unknown or not self.stages:
            raise FactorizeError(
                f"recovery has the stages {' and '.join(STAGES)},"
                f" not {', '.join(unknown) or 'none'}"
            )
        if self.bits not in BITS:
            raise FactorizeError(f"deltas have 4 or 8 bits a number, not {self.bits}")
        foreign = sorted(set(self.modes) - set(MODES))
        if foreign or not self.modes:
            raise FactorizeError(
                f"recovery practises the modes {' and '.join(MODES)}, "
                f"not {', '.join(foreign) or 'none'}"
            )
        if (
            min(1 if self.rank is None else self.rank, self.tokens) < 1
            or self.minutes <= 0
            or (self.steps is not None and self.steps < 1)
        ):
            raise FactorizeError("recovery needs a rank, tokens, minutes and steps above zero")


def recover(
    model: Any,
    plan: Plan,
    windows: torch.Tensor,
    options: RecoverOptions,
    progress: ProgressFn,
    command: str = "",
    state: Path | None = None,
    start: Deltas | None = None,
) -> tuple[Plan, Deltas]:
    """`model` is the dense model of `plan`, which this changes; `windows` [N, S] are token ids.

    `state` is a file that keeps where the distillation stands, for a run that is stopped. `start`
    has the deltas of `plan` that this run goes on from, cut to the largest singular vectors where
    the rank is smaller. Raises FactorizeError.
    """
    options.check()
    rank = options.rank or (RANK if start is None else start.rank)
    options = replace(options, rank=rank)
    student = Student(model, plan, rank, start)
    tensors = {} if start is None else dict(start.tensors)
    steps = 0
    if "repair" in options.stages:
        repair(student, windows, plan.facts.options.top_k, RepairOptions(), progress)
        tensors["down.whole"] = _whole_parts(student)
    if "lora" in options.stages:
        lessons = _lessons(plan, options)
        if start is not None:
            # near the end of what can be learnt, the first rates would undo it
            lessons = replace(lessons, into_rate=2e-4, out_of_rate=4e-5, goes_on=True)
        kept = None if state is None else KeptFile(state, _key(plan, windows, options, start))
        steps = distill(student, windows, lessons, progress, kept=kept)
        tensors |= _low_rank_parts(student, options)
    words = _words(options, steps)
    recovered = replace(plan, facts=replace(plan.facts, method=f"{plan.facts.method}; {words}"))
    made = DeltaFacts(
        plan_sha256=recovered.sha256,
        texts_sha256=_sha256(windows),
        method=words,
        command=command,
        steps=steps + (0 if start is None else start.facts.steps),
        tokens=windows.numel() + (0 if start is None else start.facts.tokens),
    )
    return recovered, Deltas(tensors, made)


def _whole_parts(student: Student) -> torch.Tensor:
    """[L, H, I] what repair has added to the down projections, in this run and before."""
    parts = [ffn.down.whole for ffn in student.ffns]
    return torch.stack([part for part in parts if part is not None]).half()


def _lessons(plan: Plan, options: RecoverOptions) -> DistillOptions:
    """Three steps at the plan's own number of experts for one at half of it; one by the prompt."""
    top_k = plan.facts.options.top_k
    turns = {
        "token": (*[Lesson(top_k)] * 3, Lesson(max(1, top_k // 2))),
        "sequence": (Lesson(top_k, by_prompt=True),),
    }
    return DistillOptions(
        steps=options.steps,
        minutes=options.minutes,
        lessons=tuple(lesson for mode in MODES if mode in options.modes for lesson in turns[mode]),
        seed=options.seed,
    )


def _low_rank_parts(student: Student, options: RecoverOptions) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for part in PARTS:
        pieces = [getattr(ffn, part) for ffn in student.ffns]
        into = torch.stack([piece.into.detach() for piece in pieces])
        out_of = torch.stack([piece.out_of.detach() for piece in pieces])
        tensors |= low_rank(part, into, out_of, into.shape[-1], options.bits)
    return tensors


def _words(options: RecoverOptions, steps: int) -> str:
    modes = "" if options.modes == ("token",) else f" (modes {', '.join(options.modes)})"
    bits = "" if options.bits == 8 else f" in int{options.bits}"
    words = {
        "repair": "down projections repaired layer by layer",
        "lora": f"{steps} steps of distillation into deltas of rank {options.rank}{bits}{modes}",
    }
    return ", ".join(words[stage] for stage in STAGES if stage in options.stages)


def _key(plan: Plan, windows: torch.Tensor, options: RecoverOptions, start: Deltas | None) -> str:
    """Of all that the distillation depends on."""
    begun = None if start is None else start.sha256
    threads = torch.get_num_threads()
    depends = [plan.sha256, _sha256(windows), asdict(options), threads, begun, RECIPE]
    said = json.dumps(depends)
    return hashlib.sha256(said.encode()).hexdigest()


def _sha256(windows: torch.Tensor) -> str:
    return hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()


def recovery_modes(words: str) -> tuple[str, ...]:
    """The modes that `token,sequence` names, in their order."""
    return _in_order(words, MODES)


def recovery_stages(words: str) -> tuple[str, ...]:
    """The stages that `repair,lora` names, in the order in which they run."""
    return _in_order(words, STAGES)


def _in_order(words: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """The `known` ones first, then those that check() will refuse."""
    named = {word.strip() for word in words.split(",") if word.strip()}
    return tuple(name for name in known if name in named) + tuple(sorted(named - set(known)))
