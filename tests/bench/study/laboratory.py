"""From a cell to its values: which model, which choice, which measurement."""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from moestro.factorize import Deltas, Plan, demo_deltas, demo_plan
from moestro.factorize.methods import load_dense, load_tokenizer

from .accuracy import measure_accuracy
from .cells import ACCURACY, FORMAT, QUALITY, SPEED, Cell, Values
from .quality import bytes_per_token, hit_rate, measure_quality
from .rows import GEOMETRIES
from .simulate import (
    Choice,
    Experts,
    Griffin,
    Oracle,
    Sections,
    Simulation,
    add_deltas,
    column_lengths,
)
from .sources import Sources
from .speed import measure_speed

PLANNED = ("experts", "recovered")  # methods whose plan the study makes


class Laboratory:
    """Measures cells on one dense model, which it loads at the first one."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def conditions(self, cell: Cell) -> Mapping[str, Any]:
        """All that a cell's values depend on, beside its own fields."""
        sources, scope = self._sources, self._sources.scope
        known: dict[str, Any] = {"format": FORMAT, "dense": sources.dense.name}
        if cell.measure == QUALITY:
            known |= {"held_out_sha256": sources.held_out_sha256, "windows": scope.windows}
        if cell.measure == ACCURACY:
            known |= {"questions_sha256": sources.questions_sha256[cell.task]}
        if cell.method in PLANNED:
            known |= {
                "calibration_sha256": sources.calibration_sha256,
                "calibration_tokens": scope.calibration_tokens,
                "router_steps": scope.router_steps,
            }
        if cell.method in (*PLANNED, "demo"):
            known |= {"geometry": asdict(GEOMETRIES[cell.active])}
        if cell.method == "recovered":
            known |= {"recover_minutes": scope.recover_minutes}
        if cell.method == "demo":
            known |= {"plan_sha256": demo_plan().sha256, "deltas_sha256": demo_deltas().sha256}
        return known

    def measure(self, cell: Cell) -> Values:
        if cell.measure == SPEED:
            return self._speed(cell)
        plan, deltas = self._plan(cell)
        model = self._dense_model
        if deltas is not None:
            model = load_dense(self._sources.dense)
            add_deltas(model, deltas)
        choice = self._choice(cell, plan)
        simulation = Simulation(model, choice)
        if cell.measure == ACCURACY:
            return self._accuracy(cell, simulation)
        values = measure_quality(
            simulation,
            self._sources.windows,
            self._dense_hidden,
            after_prompt=cell.method == "griffin",
        )
        if isinstance(choice, Experts):
            counted = Experts(choice.plan, choice.top_k, chosen=[])
            first = self._sources.windows[:, 0]  # one window of each text
            values["hit_rate"] = round(hit_rate(Simulation(model, counted), counted, first), 4)
            values["router_hit"] = choice.plan.facts.router_hit
        if deltas is not None:
            values["recovery_steps"] = deltas.facts.steps
        experts = 0 if plan is None else plan.facts.options.experts
        neurons = cell.active * model.config.intermediate_size
        return values | {"bytes_per_token": bytes_per_token(model.config, neurons, experts)}

    @cached_property
    def _dense_model(self) -> Any:
        return load_dense(self._sources.dense)

    @cached_property
    def _dense_hidden(self) -> torch.Tensor:
        """[texts * N, S, H] of the dense model; kept as a file."""
        sources = self._sources
        path = sources.folder / "work" / f"dense-{sources.held_out_sha256[:16]}.safetensors"
        if not path.is_file():
            simulation = Simulation(self._dense_model, None)
            sections = Sections.halves(sources.scope.window_tokens)
            rows = [simulation.hidden(ids, sections) for ids in sources.windows.flatten(0, 1)]
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".partial")
            save_file({"hidden": torch.stack(rows)}, aside)
            aside.replace(path)
        return load_file(path)["hidden"]

    def _plan(self, cell: Cell) -> tuple[Plan | None, Deltas | None]:
        if cell.method == "demo":
            return demo_plan(), demo_deltas()
        if cell.method == "experts":
            return self._sources.plan(cell.split, cell.router, cell.active), None
        if cell.method == "recovered":
            return self._sources.recovered(cell.split, cell.router, cell.active)
        return None, None

    def _choice(self, cell: Cell, plan: Plan | None) -> Choice | None:
        count = round(cell.active * self._dense_model.config.intermediate_size)
        if cell.method == "oracle":
            return Oracle(count, column_lengths(self._dense_model))
        if cell.method == "griffin":
            return Griffin(count)
        return None if plan is None else Experts(plan, GEOMETRIES[cell.active].active)

    def _accuracy(self, cell: Cell, simulation: Simulation) -> Values:
        sources = self._sources
        values = measure_accuracy(
            simulation, load_tokenizer(sources.dense), sources.questions[cell.task]
        )
        return {**values, "metric": sources.metric(cell.task)}

    def _speed(self, cell: Cell) -> Values:
        """The dense model is served as all experts of a plan: what the engine runs are experts."""
        share = 0.75 if cell.active == 1 else cell.active
        # any split has this geometry; slices are made in a moment
        plan = demo_plan() if share != 0.5 else self._sources.plan("contiguous", "ridge", share)
        shape = GEOMETRIES[share]
        active = shape.experts if cell.active == 1 else shape.active
        with tempfile.TemporaryDirectory(dir=self._scratch()) as scratch:
            return measure_speed(plan, self._sources.dense, Path(scratch), active)

    def _scratch(self) -> Path:
        self._sources.folder.mkdir(parents=True, exist_ok=True)
        return self._sources.folder
