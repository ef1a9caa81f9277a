"""Which MLPs of a model let a prompt choose among their neurons, found by running them."""

import logging
from typing import Any

import torch

from moestro.cache import human_bytes
from moestro.engine.facts import EngineConfig
from moestro.engine.lanes import LanePart, PackedLane, PassLane, last_rows
from moestro.engine.model import experts_aside
from moestro.engine.neurons import Mlp, mlp_of
from moestro.engine.planning import Blueprint
from moestro.engine.selection import SequenceExperts

log = logging.getLogger("moestro.engine")

USUAL_DENSITY = 0.5  # that the log reckons with where none is given
PROBE = ((0, 0), (0, 0, 0))  # two sequences, so that rows of one of them are seen as such


def choosable_mlps(blueprint: Blueprint, lane: PassLane) -> dict[torch.nn.Module, Mlp]:
    """MLPs that every pass runs once on all of its rows.

    None on a device with memory of its own: its KV is taken whole, there is no room in it.
    """
    if blueprint.device.room is not None:
        return {}
    dtype, experts = blueprint.device.compute_dtype, set(blueprint.topology.experts_paths)
    with torch.inference_mode():
        found = {
            module: mlp
            for path, module in lane.model.named_modules()
            if path not in experts and (mlp := mlp_of(module, dtype)) is not None
        }
        rows = rows_seen(lane, list(found)) if found else {}
    own = [sum(map(len, PROBE))] if lane.packs else [len(ids) for ids in PROBE]
    return {module: mlp for module, mlp in found.items() if rows[module] == own}


def rows_seen(lane: PassLane, modules: list[torch.nn.Module]) -> dict[torch.nn.Module, list[int]]:
    """How many rows each of `modules` is given, call by call, while PROBE is computed."""
    seen = {module: list[int]() for module in modules}

    def note(module: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        (rows,) = (*given, *named.values())
        seen[module].append(rows.numel() // rows.shape[-1])

    handles = [each.register_forward_pre_hook(note, with_kwargs=True) for each in modules]
    own = lane.with_own_pages(len(PROBE)) if isinstance(lane, PackedLane) else lane
    parts = [LanePart((at, 0), [at], list(ids), 0) for at, ids in enumerate(PROBE)]
    try:
        with experts_aside(lane.model):
            for some in [parts] if own.packs else [[part] for part in parts]:
                own.run(some, last_rows(some))
    finally:
        for handle in handles:
            handle.remove()
        for part in parts:
            own.forget(part.key)
    return seen


def log_neurons(config: EngineConfig, found: SequenceExperts) -> None:
    if not found.neuron_layers:
        log.info("neurons of a sequence (mode sequence): all of what all tokens run serve")
        return
    density = config.sequence_density or USUAL_DENSITY
    size_bytes = found.copies_bytes(config.sequence_least_tokens, density)
    log.info(
        "neurons of a sequence (mode sequence): %d MLPs that all tokens run are chosen from in"
        " blocks of %d, at density %g its copies take %s of the KV cache; all others stay whole",
        found.neuron_layers,
        Mlp.block,
        density,
        human_bytes(size_bytes),
    )
