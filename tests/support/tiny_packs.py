"""Packs of a few kilobytes whose every blob says whose it is."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from moestro.cache import BlobLayout, Pack, PackLayer, PackSpec, PackWriter, open_or_build

LOG = logging.getLogger("tests.cache")

SMALL = BlobLayout.of({"up": ("float32", (3, 5)), "down": ("bfloat16", (7,))})  # one page
LARGE = BlobLayout.of({"up": ("float32", (40, 30)), "bias": ("int8", (5,))})  # two pages


def tiny_spec(*experts_per_layer: int, model: str = "tiny") -> PackSpec:
    """Layers of small blobs, except every third one, whose blobs are large."""
    return PackSpec(
        model=model,
        codec="native",
        layers=tuple(
            PackLayer(f"layers.{index}.mlp.experts", count, LARGE if index % 3 == 2 else SMALL)
            for index, count in enumerate(experts_per_layer)
        ),
    )


def mixed_spec(*experts_per_layer: int) -> PackSpec:
    """Every layer has small and large blobs, in turns of one, two and three."""
    turns = (SMALL, LARGE, LARGE, SMALL, SMALL, SMALL)
    return PackSpec(
        model="tiny",
        codec="mixed",
        layers=tuple(
            PackLayer.of(
                f"layers.{index}.mlp.experts",
                [turns[(index + expert) % len(turns)] for expert in range(count)],
            )
            for index, count in enumerate(experts_per_layer)
        ),
    )


def mark(layer: int, expert: int) -> int:
    """The value of every element of an expert: exact in all the dtypes of these packs."""
    return layer * 20 + expert + 1


def layer_tensors(spec: PackSpec, layer: int, kind: int = 0) -> dict[str, torch.Tensor]:
    """Those of one kind of a mixed layer, of all experts of any other."""
    whole = spec.layers[layer]
    layout = whole.kinds[kind]
    experts = [e for e in range(whole.num_experts) if whole.layout_of(e) == layout]
    values = torch.tensor([mark(layer, expert) for expert in experts])
    return {
        t.name: values.view(-1, *[1] * len(t.shape))
        .expand(len(experts), *t.shape)
        .to(getattr(torch, t.dtype))
        for t in layout.tensors
    }


def fill_tiny(spec: PackSpec, writer: PackWriter) -> None:
    for layer in writer.missing:
        kinds = range(len(spec.layers[layer].kinds))
        writer.add_layer(layer, *(layer_tensors(spec, layer, kind) for kind in kinds))


def build_tiny(path: Path, spec: PackSpec) -> Pack:
    return open_or_build(path, spec, lambda writer: fill_tiny(spec, writer), lambda: None, LOG)


def assert_is(tensors: Mapping[str, torch.Tensor], spec: PackSpec, layer: int, expert: int) -> None:
    """All tensors of the expert are there, and every element is the expert's own."""
    layout = spec.layers[layer].layout_of(expert)
    assert list(tensors) == [t.name for t in layout.tensors]
    for t in layout.tensors:
        found = tensors[t.name]
        assert tuple(found.shape) == t.shape
        assert found.dtype == getattr(torch, t.dtype)
        assert bool((found == mark(layer, expert)).all()), f"{t.name} of {layer}, {expert}"
