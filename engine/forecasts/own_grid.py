"""What becomes of a quantized checkpoint's experts, in one line for the start and the plan."""

from moestro.cache import human_bytes
from moestro.engine.facts import EngineConfig
from moestro.engine.formats import ExpertsModule, codec_of, in_tiles, keeps_grids, pack_layer
from moestro.engine.planning import Blueprint

NATIVE = "native"
MXFP4 = "mxfp4"  # whose numbers are found again when they are encoded, all of them exactly
NO_TILES = "its own grid is kept only where moestro's library computes, on a CPU"
ZEROS = {"none": "", "integer": ", integer zeros", "float": ", float zeros"}


def own_grid_line(config: EngineConfig, blueprint: Blueprint) -> str | None:
    """Whether their own grid is kept, or why not; None where the checkpoint is not quantized, and

    for a GGUF file that has no blocks of int4.
    """
    name, entries, method = config.format_name, blueprint.experts, _method(blueprint)
    if method is None:
        return None
    kept = [entry for entry in entries if keeps_grids(blueprint.codec, entry)]
    if method == MXFP4 and name == MXFP4:
        return f"experts: the checkpoint's own {MXFP4}, kept as it is"
    words = _words(kept[0]) if kept else ""
    if len(kept) == len(entries):
        return f"experts: the checkpoint's own {words}, kept as it is"
    dtype = str(next(iter(entries[0].tensors.values()))[0]).removeprefix("torch.")
    decoded = f"decoded from {method} "
    decoded += f"to {dtype}" if name == NATIVE else f"and rounded again to {name}"
    if kept:
        rest = next(entry for entry in entries if not keeps_grids(blueprint.codec, entry))
        return (
            f"experts: the checkpoint's own {words}, kept as it is in {len(kept)} of"
            f" {len(entries)} layers; elsewhere {decoded}, because {rest.no_grid}"
        )
    return f"experts: {decoded}{_otherwise(name, method, blueprint)}"


def _method(blueprint: Blueprint) -> str | None:
    checkpoint = blueprint.checkpoint
    if checkpoint.gguf is not None:
        return "GGUF" if any(entry.grids for entry in blueprint.experts) else None
    return None if checkpoint.quantization is None else checkpoint.quantization.method


def _otherwise(name: str, method: str, blueprint: Blueprint) -> str:
    """What would keep them as they are, or why nothing does."""
    entry, place = blueprint.experts[0], blueprint.device
    tiles = in_tiles(place.compute_dtype, place.place.type)
    kind = MXFP4 if method == MXFP4 else next((g.kind for g in entry.grids.values()), None)
    if kind is None:
        # what is decoded alone is not rounded to a grid: there is nothing to explain
        return "" if name == NATIVE else f", because {entry.no_grid}"
    if not tiles:
        return f"; {NO_TILES}"
    if kind == name:
        return ""
    layer = pack_layer(codec_of(kind, place.compute_dtype), entry)
    words = MXFP4 if kind == MXFP4 else _words(entry)
    return (
        f"; --expert-format {kind} would keep the checkpoint's own {words} as it is, an expert in"
        f" {human_bytes(layer.total_bytes // layer.num_experts)} instead of"
        f" {human_bytes(blueprint.spec.slot_bytes)}"
    )


def _words(entry: ExpertsModule) -> str:
    """Of the grid of its first matrix."""
    form = next(iter(entry.grids.values()))
    groups = f"groups of {form.group}" if form.group else "whole rows"
    order = ", inputs in act-order" if entry.orders else ""
    return f"{form.kind} grid ({groups}, {form.scale} scales{ZEROS[form.zero]}{order})"
