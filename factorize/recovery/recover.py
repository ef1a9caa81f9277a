"""Recovery as one stage: from a plan to a plan with better routers, and deltas of the weights."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moestro.engine import ProgressFn
from moestro.factorize.facts import (
    PARTS,
    PLAN_FORMAT,
    DeltaFacts,
    Deltas,
    FactorizeError,
    Plan,
    RouterWeights,
    low_rank,
)

from .distill import DistillOptions, distill
from .kept import KeptFile
from .repair import RepairOptions, repair
from .student import Student

STAGES = ("repair", "lora")
TRAINED_RANK = 8  # learns more easily than the rank that is kept


@dataclass(frozen=True, slots=True)
class RecoverOptions:
    """Which stages, and how long: `minutes` bound the distillation, or `steps` do, exactly."""

    stages: tuple[str, ...] = STAGES
    minutes: float = 60.0
    steps: int | None = None
    tokens: int = 65_536  # of the texts; each is read at least once by the repair
    rank: int = 5  # that is kept of the low-rank deltas
    seed: int = 0

    def check(self) -> None:
        """Raises FactorizeError."""
        unknown = sorted(set(self.stages) - set(STAGES))
        if unknown or not self.stages:
            raise FactorizeError(
                f"recovery has the stages {' and '.join(STAGES)},"
                f" not {', '.join(unknown) or 'none'}"
            )
        if (
            min(self.rank, self.tokens) < 1
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
) -> tuple[Plan, Deltas]:
    """`model` is the dense model of `plan`, which this changes; `windows` [N, S] are token ids.

    `state` is a file that keeps where the distillation stands, for a run that is stopped. Raises
    FactorizeError.
    """
    options.check()
    student = Student(model, plan, max(options.rank, TRAINED_RANK))
    tensors: dict[str, torch.Tensor] = {}
    steps = 0
    if "repair" in options.stages:
        tensors["down.whole"] = _repaired(student, plan, windows, progress)
    if "lora" in options.stages:
        kept = None if state is None else KeptFile(state, _key(plan, windows, options))
        steps = distill(student, windows, _lesson(plan, options), progress, kept=kept)
        tensors |= _low_rank_parts(student, options.rank)
    words = _words(options, steps)
    routers = torch.stack([ffn.router.detach() for ffn in student.ffns]).to(plan.routers.dtype)
    facts = replace(plan.facts, method=f"{plan.facts.method}; {words}")
    recovered = replace(
        plan, router_weights=RouterWeights(routers), facts=facts, format=PLAN_FORMAT
    )
    made = DeltaFacts(
        plan_sha256=recovered.sha256,
        texts_sha256=_sha256(windows),
        method=words,
        command=command,
        steps=steps,
        tokens=windows.numel(),
    )
    return recovered, Deltas(tensors, made)


def _repaired(
    student: Student, plan: Plan, windows: torch.Tensor, progress: ProgressFn
) -> torch.Tensor:
    """[L, H, I] what repair has added to the down projections."""
    before = [ffn.down.linear.weight.detach().float().clone() for ffn in student.ffns]
    repair(student, windows, plan.facts.options.top_k, RepairOptions(), progress)
    after = [ffn.down.linear.weight.detach().float() for ffn in student.ffns]
    return torch.stack([new - old for new, old in zip(after, before, strict=True)]).half()


def _lesson(plan: Plan, options: RecoverOptions) -> DistillOptions:
    """Two steps at the plan's own number of experts for each at half of it."""
    top_k = plan.facts.options.top_k
    return DistillOptions(
        steps=options.steps,
        minutes=options.minutes,
        top_ks=(top_k, top_k, max(1, top_k // 2)),
        seed=options.seed,
    )


def _low_rank_parts(student: Student, rank: int) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for part in PARTS:
        pieces = [getattr(ffn, part) for ffn in student.ffns]
        into = torch.stack([piece.into.detach() for piece in pieces])
        out_of = torch.stack([piece.out_of.detach() for piece in pieces])
        tensors |= low_rank(part, into, out_of, rank)
    return tensors


def _words(options: RecoverOptions, steps: int) -> str:
    words = {
        "repair": "down projections repaired layer by layer",
        "lora": f"{steps} steps of distillation into deltas of rank {options.rank} and the routers",
    }
    return ", ".join(words[stage] for stage in STAGES if stage in options.stages)


def _key(plan: Plan, windows: torch.Tensor, options: RecoverOptions) -> str:
    """Of all that the distillation depends on."""
    said = json.dumps([plan.sha256, _sha256(windows), asdict(options), torch.get_num_threads()])
    return hashlib.sha256(said.encode()).hexdigest()


def _sha256(windows: torch.Tensor) -> str:
    return hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()


def recovery_stages(words: str) -> tuple[str, ...]:
    """The stages that `repair,lora` names, in the order in which they run."""
    named = {word.strip() for word in words.split(",") if word.strip()}
    return tuple(stage for stage in STAGES if stage in named) + tuple(sorted(named - set(STAGES)))
